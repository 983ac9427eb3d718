"""Load models to prune with decoder layers on disk or sharded over devices, never all in memory."""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from accelerate import init_empty_weights
from torch.distributed.device_mesh import DeviceMesh
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import GENERATION_CONFIG_NAME

from gqaprune.models.architecture import read_geometry
from gqaprune.models.config_facts import correct_config
from gqaprune.models.dtypes import check_dtype
from gqaprune.models.families import get_family
from gqaprune.models.loading import build_model, check_keys, check_stored, find_other_storage
from gqaprune.models.loading_guard import guard_loading
from gqaprune.models.sources import (
    StoredTensor,
    fetch,
    find_tensors,
    load_config,
    locate,
    match_tensors,
)
from gqaprune.placement.disk_store import offload_layers
from gqaprune.placement.layer_store import find_store
from gqaprune.placement.sharded_store import shard_layers


def load_offloaded_model(
    source: str | Path,
    folder: str | Path,
    dtype: str = "auto",
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Load a causal LM to prune whose decoder layers stay on disk, with one in memory at a time.

    It can be pruned with settings that work layer by layer, measured and saved, but not run or trained otherwise.

    Args:
        source: a folder or hub name with safetensors files, which must not be moved.
        folder: changed layers are kept under a temporary name beside this path while the model is used.
        dtype: type of the weights, as for `load_model`.
        attn_implementation: attention kernel, as for `load_model`.
        trust_remote_code: run code that comes with the checkpoint.

    Raises:
        ValueError: like `load_model`, or if its layers cannot be read one by one.
    """

    def offload(model: PreTrainedModel, stored: Mapping[str, StoredTensor]) -> None:
        offload_layers(model, stored, Path(folder))

    return _load_by_layer(source, dtype, attn_implementation, trust_remote_code, offload)


def load_sharded_model(
    source: str | Path,
    mesh: DeviceMesh,
    dtype: str = "auto",
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Load a causal LM whose decoder layers are sharded over devices, so that no rank reads all. Every rank calls it.

    It can be pruned with settings that work layer by layer or with gates, measured and saved, always with a call on
    every rank; `gqaprune.placement.fsdp.shard_model` prepares it for training with FSDP2.

    Args:
        source: a folder or hub name with safetensors files.
        mesh: devices to shard layers over, one dimension; other parameters are whole on each device.
        dtype: type of the weights, as for `load_model`.
        attn_implementation: attention kernel, as for `load_model`.
        trust_remote_code: run code that comes with the checkpoint.

    Raises:
        ValueError: like `load_model`, or if its layers cannot be read one by one.
    """
    device = torch.device(mesh.device_type)

    def shard(model: PreTrainedModel, stored: Mapping[str, StoredTensor]) -> None:
        shard_layers(model, stored, mesh, device)

    model = _load_by_layer(source, dtype, attn_implementation, trust_remote_code, shard)
    find_store(model).move_to(device)
    return model


def can_read_by_layer(source: str | Path, trust_remote_code: bool = False) -> bool:
    """Return whether a model's layers can be read from its files one by one.

    Raises:
        ValueError: if the model does not exist, or its family is not supported.
    """
    return _find_obstacle(source, trust_remote_code) is None


def _find_obstacle(source: str | Path, trust_remote_code: bool) -> str | None:
    """Describe why a model's layers cannot be read one by one, with a way out; None if they can."""
    if locate(source)[1]:
        return (
            f"layers can be read one by one only from safetensors files, but {source} is a GGUF file: convert it first "
            "with gqaprune export --format stock"
        )
    if stored_otherwise := find_other_storage(load_config(source, trust_remote_code)):
        return (
            f"{stored_otherwise} have other names or shapes in files than in the model, so {source} cannot be read "
            "layer by layer: set pruning.offload and pruning.sharded to false, and use unquantised weights"
        )
    return None


def _load_by_layer(
    source: str | Path,
    dtype: str,
    attn_implementation: str | None,
    trust_remote_code: bool,
    read: Callable[[PreTrainedModel, Mapping[str, StoredTensor]], None],
) -> PreTrainedModel:
    """Build a model without weights, and let `read` load the weights that it should have in memory."""
    check_dtype(dtype)
    if obstacle := _find_obstacle(source, trust_remote_code):
        raise ValueError(obstacle)
    config = load_config(source, trust_remote_code)
    with guard_loading("model", source):
        family, _ = get_family(config), read_geometry(config)
        checkpoint = fetch(source)
        files = find_tensors(checkpoint)
        own_dtype = check_stored(files, config, dtype, trust_remote_code)
        with init_empty_weights(include_buffers=False):
            model = build_model(config, own_dtype, attn_implementation, trust_remote_code)
        stored = match_tensors(files, model)
        read(model, stored)
        missing = model.state_dict().keys() - stored.keys()
        model.tie_weights(missing_keys=missing, recompute_mapping=False)  # removes tied weights from `missing`
        strange = stored.keys() - model.state_dict().keys()
        check_keys({"mismatched_keys": (), "missing_keys": missing, "unexpected_keys": strange}, family.layers)
        correct_config(model)
        if (checkpoint / GENERATION_CONFIG_NAME).is_file():
            model.generation_config = GenerationConfig.from_pretrained(checkpoint)
    return model.eval()
