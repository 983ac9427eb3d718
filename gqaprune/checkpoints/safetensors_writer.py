"""Write a model as a folder: config, tokenizer and safetensors files.

`stock` has equal counts in every layer; `per-layer` has unequal ones, in `per_layer_config`, with a small modeling file
beside the weights; `padded` is a stock class whose smaller layers are padded with zeros; `nemotron-nas` is for engines
with this architecture, which transformers lacks, and has a width for each layer.
"""

import copy
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.dynamic_module_utils import custom_object_save
from transformers.tokenization_utils_base import TOKENIZER_CONFIG_FILE
from transformers.utils import CONFIG_NAME

from gqaprune.checkpoints.base import Content
from gqaprune.checkpoints.padding import pad_checkpoint, pad_state_dict
from gqaprune.geometry import Geometry
from gqaprune.models.architecture import make_stock_config, read_geometry
from gqaprune.models.config_facts import has_own_code
from gqaprune.models.loading import load_model
from gqaprune.models.nemotron_nas import (
    CONFIGURATION_FILE,
    describe_as_nemotron_nas,
    find_nemotron_nas_shapes,
    has_attention_bias,
    write_configuration_source,
)
from gqaprune.models.per_layer import MODELING_FILE, point_to_modeling_file, write_modeling_source
from gqaprune.placement.layer_store import find_store
from gqaprune.placement.verification import check_checkpoint
from gqaprune.placement.writing_by_layer import write_weights


def write_stock(content: Content, folder: Path) -> None:
    """Write a checkpoint of a stock class, whose config can express the shapes."""
    stock = make_stock_config(content.model.config)
    assert stock is not None
    _write_class(content, folder, stock, content.state_dict)


def check_stock_config(config: PretrainedConfig) -> None:
    """Raise an error if no stock class can store the shapes.

    Raises:
        ValueError: with their differences.
    """
    if make_stock_config(config) is None:
        raise ValueError(f"{_describe_difference(read_geometry(config))}; use per-layer, or padded, which adds zeros")


def write_padded(content: Content, folder: Path) -> None:
    """Write a checkpoint of a stock class with every layer as large as the largest.

    Raises:
        ValueError: if no stock class can store the shapes.
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
    """Raise an error if the modeling file cannot inherit from the model's class.

    Raises:
        ValueError: with the class.
    """
    if has_own_code(config):
        raise ValueError(
            f"format per-layer needs a class of transformers, but {type(config).__name__} comes with its own code; use "
            "padded, which adds zeros"
        )


def write_nemotron_nas(content: Content, folder: Path) -> None:
    """Write a Nemotron-NAS checkpoint, each layer padded to a width that it allows, with the class of its config."""
    config = content.model.config
    weights = pad_state_dict(content.state_dict, config, read_geometry(config), find_nemotron_nas_shapes(config))
    if has_attention_bias(config):
        for layer in range(config.num_hidden_layers):
            name = f"model.layers.{layer}.self_attn.o_proj."
            weights.setdefault(f"{name}bias", torch.zeros_like(weights[f"{name}weight"][:, 0]))
    _write(content, folder, config, weights)
    (folder / CONFIG_NAME).write_text(json.dumps(describe_as_nemotron_nas(config), indent=2) + "\n", encoding="utf-8")
    (folder / CONFIGURATION_FILE).write_text(write_configuration_source(), encoding="utf-8")


def quantize_checkpoint(folder: Path, quantization: str, max_shard_size: str, trust_remote_code: bool) -> None:
    """Replace the weights of a checkpoint by quantised ones; its other files stay."""
    model = load_model(folder, trust_remote_code=trust_remote_code, quantization=quantization)
    for file in [*folder.glob("*.safetensors"), *folder.glob("*.safetensors.index.json")]:
        file.unlink()
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)  # it has the checkpoint's auto_map
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
    architectures, modeling = config.architectures, folder / MODELING_FILE
    source = modeling.read_bytes() if modeling.is_file() else None
    previous_config, model.config = model.config, config
    try:
        if find_store(model).is_in_memory:
            weights = None if state_dict is None else dict(state_dict)  # a copy: transformers drops tied ones from it
            model.save_pretrained(folder, state_dict=weights, max_shard_size=max_shard_size)
        else:
            write_weights(model, folder)
            model.generation_config.save_pretrained(folder)
            if model.is_remote_code():
                custom_object_save(model, folder, config)
        check_checkpoint(_list_stored(model, state_dict), folder)
    finally:
        model.config = previous_config
    # save_pretrained writes the class in memory and its code, but the checkpoint may be for another class.
    config.architectures = architectures
    if source is None:
        modeling.unlink(missing_ok=True)
    else:
        modeling.write_bytes(source)
    config.save_pretrained(folder)
    _drop_missing_code(folder)
    for file in folder.iterdir():  # weights are written with owner-only permissions: use those of the config
        if file.is_file():
            shutil.copymode(folder / "config.json", file)


def _list_stored(model: PreTrainedModel, state_dict: dict[str, Tensor] | None) -> dict[str, Tensor]:
    """Return the tensors that a model's checkpoint must have, under their names in files."""
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        state_dict = quantizer.get_state_dict_and_metadata(model)[0]
    weights = model.state_dict() if state_dict is None else state_dict
    absent = set(model._keys_to_ignore_on_save or ())
    if model.config.tie_word_embeddings:
        absent |= (model._tied_weights_keys or {}).keys()
    stored: dict[str, Tensor] = revert_weight_conversion(model, weights)
    return {name: tensor for name, tensor in stored.items() if name not in absent}


def _drop_missing_code(folder: Path) -> None:
    """Remove entries whose code is not in the folder from `auto_map` of config and tokenizer."""
    for file in (folder / CONFIG_NAME, folder / TOKENIZER_CONFIG_FILE):
        settings = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        local = {name: _name_local_class(where, folder) for name, where in settings.get("auto_map", {}).items()}
        kept = {name: where for name, where in local.items() if where is not None}
        if kept != settings.pop("auto_map", {}):
            settings |= {"auto_map": kept} if kept else {}
            text = json.dumps(settings, indent=2, sort_keys=True, ensure_ascii=False)
            file.write_text(f"{text}\n", encoding="utf-8")


def _name_local_class(where: Any, folder: Path) -> Any:
    """Turn `owner/name--modeling.Class` into `modeling.Class` if the folder has that file, else None; also in lists."""
    if isinstance(where, list):
        local = [_name_local_class(each, folder) for each in where]
        return local if any(local) else None
    name = str(where).rpartition("--")[2]
    return name if (folder / f"{name.partition('.')[0]}.py").is_file() else None


def _describe_difference(geometry: Geometry) -> str:
    if geometry.is_uniform:
        return (
            f"no stock {geometry.family} can have {geometry.query_heads[0]} query heads with a hidden size of "
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
    """Join ascending numbers, with runs as ranges: `0-3, 7`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
