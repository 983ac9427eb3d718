"""Write a model as a folder: config, tokenizer and safetensors files.

`stock` has equal counts in every layer; `per-layer` unequal ones, in `per_layer_config`, with a small modeling file
beside the weights; `padded` is a stock class with zeros for what some layers lack; `nemotron-nas` is for engines that
have this architecture, and gives each layer a width of its own. transformers does not have it.
"""

import copy
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PretrainedConfig, PreTrainedModel
from transformers.utils import CONFIG_NAME

from gqaprune.checkpoints.base import Content
from gqaprune.checkpoints.padding import pad_checkpoint, pad_state_dict
from gqaprune.models.architecture import make_stock_config, read_geometry
from gqaprune.models.loading import load_model
from gqaprune.models.nemotron_nas import (
    CONFIGURATION_FILE,
    describe_as_nemotron_nas,
    find_nemotron_nas_shapes,
    has_attention_bias,
    write_configuration_source,
)
from gqaprune.models.per_layer import MODELING_FILE, point_to_modeling_file, write_modeling_source
from gqaprune.models.sources import load_config
from gqaprune.placement.layer_store import find_store
from gqaprune.placement.writing_by_layer import write_weights
from gqaprune.plan import Geometry


def write_stock(content: Content, folder: Path) -> None:
    """Write a checkpoint of a stock class, whose config holds the shapes as they are."""
    stock = make_stock_config(content.model.config)
    assert stock is not None
    _write_class(content, folder, stock, content.state_dict)


def check_stock_config(config: PretrainedConfig) -> None:
    """Refuse shapes that no stock class can hold.

    Raises:
        ValueError: with how they differ.
    """
    if make_stock_config(config) is None:
        raise ValueError(
            f"{_describe_difference(read_geometry(config))}; per-layer keeps it as it is, padded adds zeros"
        )


def write_padded(content: Content, folder: Path) -> None:
    """Write a checkpoint of a stock class with every layer as large as the largest.

    Raises:
        ValueError: if no stock class can hold the shapes.
    """
    _write_class(content, folder, *pad_checkpoint(content.model.config, content.state_dict))


def write_per_layer(content: Content, folder: Path) -> None:
    """Write a checkpoint with the shapes of each layer in its config, and the modeling file that reads them."""
    base = MODEL_FOR_CAUSAL_LM_MAPPING[type(content.model.config)]
    config = copy.deepcopy(content.model.config)
    point_to_modeling_file(config, base)
    (folder / MODELING_FILE).write_text(write_modeling_source(config, base), encoding="utf-8")
    _write(content, folder, config, content.state_dict)


def check_class(config: PretrainedConfig) -> None:
    """Refuse a model of classes that the modeling file cannot build on.

    Raises:
        ValueError: naming the class.
    """
    if has_own_code(config):
        raise ValueError(
            f"per-layer writes a modeling file for classes of transformers, {type(config).__name__} comes with code of "
            "its own; padded adds zeros"
        )


def write_nemotron_nas(content: Content, folder: Path) -> None:
    """Write a checkpoint of Nemotron-NAS, each layer padded to a width that it has, with the class of its config."""
    config = content.model.config
    weights = pad_state_dict(content.state_dict, config, read_geometry(config), find_nemotron_nas_shapes(config))
    if has_attention_bias(config):
        for layer in range(config.num_hidden_layers):
            name = f"model.layers.{layer}.self_attn.o_proj."
            weights.setdefault(f"{name}bias", torch.zeros_like(weights[f"{name}weight"][:, 0]))
    _write(content, folder, config, weights)
    (folder / CONFIG_NAME).write_text(json.dumps(describe_as_nemotron_nas(config), indent=2) + "\n", encoding="utf-8")
    (folder / CONFIGURATION_FILE).write_text(write_configuration_source(), encoding="utf-8")


def has_own_code(config: PretrainedConfig) -> bool:
    """Whether a model is of classes that came with it, which the user has trusted, not of transformers'."""
    return not type(config).__module__.startswith("transformers.")


def quantize_checkpoint(folder: Path, quantization: str, max_shard_size: str, trust_remote_code: bool) -> None:
    """Write the weights of a checkpoint anew, quantised; all else stays."""
    model = load_model(folder, trust_remote_code=trust_remote_code, quantization=quantization)
    for file in [*folder.glob("*.safetensors"), *folder.glob("*.safetensors.index.json")]:
        file.unlink()
    config = load_config(folder, trust_remote_code)
    config.quantization_config = model.config.quantization_config
    _save_pretrained(model, config, folder, None, max_shard_size)


def _write_class(content: Content, folder: Path, config: PretrainedConfig, state_dict: dict[str, Tensor]) -> None:
    config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].__name__]
    _write(content, folder, config, state_dict)


def _write(content: Content, folder: Path, config: PretrainedConfig, state_dict: dict[str, Tensor]) -> None:
    if content.tokenizer is not None:
        content.tokenizer.save_pretrained(folder)
    _save_pretrained(content.model, config, folder, state_dict, content.max_shard_size)


def _save_pretrained(
    model: PreTrainedModel,
    config: PretrainedConfig,
    folder: Path,
    state_dict: dict[str, Tensor] | None,
    max_shard_size: str,
) -> None:
    architectures = config.architectures
    own_config, model.config = model.config, config
    try:
        if find_store(model).is_in_memory:
            model.save_pretrained(folder, state_dict=state_dict, max_shard_size=max_shard_size)
        else:
            write_weights(model, folder)
            model.generation_config.save_pretrained(folder)
    finally:
        model.config = own_config
    # save_pretrained writes the class in memory; the checkpoint may be for another one.
    config.architectures = architectures
    config.save_pretrained(folder)
    for file in folder.iterdir():  # weights are written for their owner only; they may be read like their config
        if file.is_file():
            shutil.copymode(folder / "config.json", file)


def _describe_difference(geometry: Geometry) -> str:
    if geometry.is_uniform:
        return (
            f"no stock {geometry.family} has {geometry.query_heads[0]} query heads on a hidden size of "
            f"{geometry.hidden_size}"
        )
    shapes = list(zip(geometry.query_heads, geometry.kv_heads, geometry.channels, strict=True))
    common = max(shapes, key=lambda shape: (shapes.count(shape), shape))
    others = [index for index, shape in enumerate(shapes) if shape != common]
    queries, groups, channels = common
    return (
        f"a stock checkpoint needs equal counts in every layer: layers {_join(others)} differ from {queries} query "
        f"heads, {groups} KV heads and {channels} channels"
    )


def _join(numbers: Sequence[int]) -> str:
    """Ascending numbers with runs joined: `0-3, 7`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
