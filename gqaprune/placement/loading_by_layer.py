"""Load models to prune whose decoder layers are never all in memory: on disk, or sharded over devices."""

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
    """Load a causal LM to prune whose decoder layers stay on disk: one at a time is in memory.

    It can be pruned with what goes layer by layer, measured and saved; it cannot be run or trained otherwise.

    Args:
        source: a folder or hub name with safetensors files, which have to stay there.
        folder: layers that change are kept under a temporary name beside it, as long as the model is used.
        dtype: as for `load_model`.
        attn_implementation: likewise.
        trust_remote_code: likewise.

    Raises:
        ValueError: as `load_model`, or if its layers cannot be read one by one.
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
    """Load a causal LM whose decoder layers are sharded over devices: no rank reads the whole. Every rank calls it.

    It can be pruned with what goes layer by layer or looks at gates, measured and saved, each by a call on every rank;
    `gqaprune.placement.fsdp.shard_model` makes one to train of it, by FSDP2.

    Args:
        source: a folder or hub name with safetensors files.
        mesh: devices to shard layers over, one dimension; what is outside of the layers is whole on each.
        dtype: as for `load_model`.
        attn_implementation: likewise.
        trust_remote_code: likewise.

    Raises:
        ValueError: as `load_model`, or if its layers cannot be read one by one.
    """
    device = torch.device(mesh.device_type)

    def shard(model: PreTrainedModel, stored: Mapping[str, StoredTensor]) -> None:
        shard_layers(model, stored, mesh, device)

    model = _load_by_layer(source, dtype, attn_implementation, trust_remote_code, shard)
    find_store(model).move_to(device)
    return model


def can_read_by_layer(source: str | Path, trust_remote_code: bool = False) -> bool:
    """Whether a model is stored so that its layers can be read one by one.

    Raises:
        ValueError: if there is no such model, or its family is not supported.
    """
    return _find_obstacle(source, trust_remote_code) is None


def _find_obstacle(source: str | Path, trust_remote_code: bool) -> str | None:
    """Why a model's layers cannot be read one by one, in part of a sentence with a way out; None where they can."""
    if locate(source)[1]:
        return (
            f"layers are read from safetensors files, {source} is a GGUF file: write it as such first, with "
            "gqaprune export --format stock"
        )
    if stored_otherwise := find_other_storage(load_config(source, trust_remote_code)):
        return (
            f"{stored_otherwise} are not stored as they are computed with, so {source} cannot be read layer by layer: "
            "prune it in memory, unquantised"
        )
    return None


def _load_by_layer(
    source: str | Path,
    dtype: str,
    attn_implementation: str | None,
    trust_remote_code: bool,
    read: Callable[[PreTrainedModel, Mapping[str, StoredTensor]], None],
) -> PreTrainedModel:
    """Build a model without weights, and `read` from name -> place what it should have in memory."""
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
        model.tie_weights(missing_keys=missing, recompute_mapping=False)  # what is tied is missing no longer
        strange = stored.keys() - model.state_dict().keys()
        check_keys({"mismatched_keys": (), "missing_keys": missing, "unexpected_keys": strange}, family.layers)
        correct_config(model)
        if (checkpoint / GENERATION_CONFIG_NAME).is_file():
            model.generation_config = GenerationConfig.from_pretrained(checkpoint)
    return model.eval()
