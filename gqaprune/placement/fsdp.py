"""Models whose weights strategies shard over devices: shard them layer by layer, gather them again.

FSDP2 turns parameters into DTensors, FSDP1 puts layers and model into wrappers, DeepSpeed's stage 3 empties parameters
and fills them when their module runs.
"""

from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import wrap
from transformers import PreTrainedModel

from gqaprune.models.architecture import get_layers
from gqaprune.models.wrapping import is_sharded
from gqaprune.placement.sharded_store import gather_layers


def shard_model(model: PreTrainedModel, mesh: DeviceMesh) -> None:
    """Shard a model over a mesh's devices by FSDP2, in place; nothing is done the second time.

    Args:
        model: whole in memory, or with a `ShardedStore`, which it then has no more.
        mesh: the devices, one dimension.
    """
    if isinstance(model, FSDPModule):
        return
    for layer in gather_layers(model):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def wrap_model(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """Wrap layers and model for FSDP1 inside the context of a strategy that asks for it; elsewhere nothing is done.

    Args:
        model: whose layers are wrapped in place.
        device: of this rank.

    Returns:
        The wrapper, which stands for the model, or the model.
    """
    if isinstance(model, FullyShardedDataParallel):
        return model
    layers = get_layers(model)
    for index, layer in enumerate(layers):
        layers[index] = wrap(layer, device_id=device)
    return cast(PreTrainedModel, wrap(model, device_id=device))


def distribute_model(model: PreTrainedModel, mesh: DeviceMesh | None, device: torch.device) -> PreTrainedModel:
    """Shard a model over devices as the strategy in use does; one that shards nothing leaves it whole.

    Args:
        model: whose layers are sharded in place.
        mesh: devices of FSDP2; None leaves the choice to the context of the strategy.
        device: of this rank.

    Returns:
        The model, in FSDP1's wrapper if the strategy asks for it.
    """
    if mesh is None:
        return wrap_model(model, device)
    shard_model(model, mesh)
    return model


def gather_state_dict(model: PreTrainedModel) -> dict[str, Tensor] | None:
    """A model's whole weights on rank 0 if they are sharded, else None. Every rank has to call it."""
    if not is_sharded(model):
        return None
    is_on_cpu = next(model.parameters()).device.type == "cpu"
    if isinstance(model, (FSDPModule, FullyShardedDataParallel)):
        # FSDP1 would free what is on the CPU already when it moves it there.
        options = StateDictOptions(full_state_dict=True, cpu_offload=not is_on_cpu)
        return cast(dict[str, Tensor], get_model_state_dict(cast(nn.Module, model), options=options))
    return _gather_from_deepspeed(model)


def _gather_from_deepspeed(model: PreTrainedModel) -> dict[str, Tensor]:
    """One tensor at a time, so that no device has to hold the whole."""
    import deepspeed  # type: ignore[import-not-found, unused-ignore]

    is_first = torch.distributed.get_rank() == 0
    whole = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        with deepspeed.zero.GatheredParameters([tensor], enabled=hasattr(tensor, "ds_id")):
            if is_first:
                whole[name] = tensor.detach().to("cpu", copy=True)
    return whole
