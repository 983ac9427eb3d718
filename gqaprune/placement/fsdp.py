"""Shard models over devices layer by layer as strategies do, and gather their weights again.

FSDP2 turns parameters into DTensors, FSDP1 wraps layers and model, and DeepSpeed's stage 3 empties parameters and fills
them while their module runs.
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
    """Shard a model over a mesh's devices with FSDP2, in place; a second call does nothing.

    Args:
        model: model that is whole in memory or has a `ShardedStore`, which is removed.
        mesh: the devices, one dimension.
    """
    if isinstance(model, FSDPModule):
        return
    for layer in gather_layers(model):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def wrap_model(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """Wrap layers and model for FSDP1 in the context of a strategy that asks for it; else do nothing.

    Args:
        model: model whose layers are wrapped in place.
        device: device of this rank.

    Returns:
        The wrapper of the model, or the model.
    """
    if isinstance(model, FullyShardedDataParallel):
        return model
    layers = get_layers(model)
    for index, layer in enumerate(layers):
        layers[index] = wrap(layer, device_id=device)
    return cast(PreTrainedModel, wrap(model, device_id=device))


def distribute_model(model: PreTrainedModel, mesh: DeviceMesh | None, device: torch.device) -> PreTrainedModel:
    """Shard a model over devices in the way of the current strategy, if it shards models.

    Args:
        model: model whose layers are sharded in place.
        mesh: devices of FSDP2; None leaves the choice to the context of the strategy.
        device: device of this rank.

    Returns:
        The model, in FSDP1's wrapper if the strategy asks for it.
    """
    if mesh is None:
        return wrap_model(model, device)
    shard_model(model, mesh)
    return model


def gather_state_dict(model: PreTrainedModel) -> dict[str, Tensor] | None:
    """Gather a model's whole weights on rank 0 if they are sharded, else return None. Every rank must call it."""
    if not is_sharded(model):
        return None
    is_on_cpu = next(model.parameters()).device.type == "cpu"
    if isinstance(model, (FSDPModule, FullyShardedDataParallel)):
        # FSDP1 would free weights that are already on the CPU when it moves them there.
        options = StateDictOptions(full_state_dict=True, cpu_offload=not is_on_cpu)
        return cast(dict[str, Tensor], get_model_state_dict(cast(nn.Module, model), options=options))
    return _gather_from_deepspeed(model)


def _gather_from_deepspeed(model: PreTrainedModel) -> dict[str, Tensor]:
    """Gather one tensor at a time, so that no device needs the whole model."""
    import deepspeed  # type: ignore[import-not-found, unused-ignore]

    is_first = torch.distributed.get_rank() == 0
    whole = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        with deepspeed.zero.GatheredParameters([tensor], enabled=hasattr(tensor, "ds_id")):
            if is_first:
                whole[name] = tensor.detach().to("cpu", copy=True)
    return whole
