"""Read GGUF files that gqaprune wrote, also if llama.cpp has quantised them: config, weights, tokenizer.

transformers cannot read layers of unequal sizes from GGUF; it reads all other files.
"""

import copy
import dataclasses
import functools
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import pre_tokenizers
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig, PreTrainedTokenizerFast
from transformers.integrations.gguf import convert_gguf_tokenizer, get_gguf_tokenizer

from gqaprune.common.errors import first_line
from gqaprune.common.json_files import parse_json
from gqaprune.models.architecture import find_layer, read_geometry
from gqaprune.models.config_bounds import check_bounds
from gqaprune.models.gguf_file import GgufHeader, read_tensor
from gqaprune.models.gguf_layout import ARCHITECTURES, CONFIG_KEY, FAMILIES, unpack_tensor

_NOT_OF_FIELDS = {"allow_global_per_layer_attribute_access", "head_dim", "per_layer_config"}
"""Settings of a config that are not fields of its class."""
_OF_A_CHECKPOINT = {"architectures", "dtype"}
"""Fields that describe the files that a config came with."""


def is_own(header: GgufHeader) -> bool:
    """Return whether gqaprune wrote a file."""
    return CONFIG_KEY in header.metadata


def count_layers(header: GgufHeader) -> int:
    """Count the decoder layers whose tensors are in a file, whoever wrote it.

    Raises:
        ValueError: if a layer is missing, or the metadata has another number of layers or none (transformers would
            then build 32).
    """
    layers = {find_layer(name, "blk") for name in header.tensors} - {None}
    key = f"{header.metadata.get('general.architecture')}.block_count"
    promised = header.metadata.get(key, len(layers) if is_own(header) else None)
    if layers != set(range(len(layers))) or promised != len(layers):
        raise ValueError(f"its metadata says {promised} layers, but it has {len(layers)}")
    return len(layers)


def describe_config(config: PretrainedConfig) -> str:
    """Encode a config as JSON for a file, without settings that name code or other files."""
    settings = config.to_diff_dict()
    known = _list_settings(type(config)) | {"model_type"}
    return json.dumps({name: value for name, value in settings.items() if name in known})


def read_config(header: GgufHeader) -> PretrainedConfig:
    """Rebuild the config of a model that gqaprune wrote, only from settings that `describe_config` writes.

    Raises:
        ValueError: if it is broken, or does not fit the file's layers.
    """
    settings = parse_json(header.metadata[CONFIG_KEY])
    check_bounds(settings)
    family = settings.get("model_type")
    architecture = header.metadata.get("general.architecture")
    for what, value, known in (("model type", family, FAMILIES), ("architecture", architecture, ARCHITECTURES)):
        if value not in known:
            raise ValueError(f"its {what} must be one of {', '.join(known)}, got {value!r}")
    if settings.get("num_hidden_layers") != (layers := count_layers(header)):
        raise ValueError(f"its config says {settings.get('num_hidden_layers')} layers, but it has {layers}")
    config_class = CONFIG_MAPPING[family]
    taken = _list_settings(config_class)
    return config_class(**{name: value for name, value in settings.items() if name in taken})


def read_foreign_config(file: Path) -> PretrainedConfig:
    """Read the config in a GGUF file that another tool wrote."""
    return copy.deepcopy(_read_foreign_config(file, file.stat().st_mtime_ns, file.stat().st_size))


@functools.lru_cache(maxsize=4)
def _read_foreign_config(file: Path, changed: int, size: int) -> PretrainedConfig:
    """Parse the config of a file as it is now: this takes transformers seconds, and a run asks for it many times."""
    return AutoConfig.from_pretrained(file.parent, gguf_file=file.name)


def _list_settings(config_class: type[PretrainedConfig]) -> set[str]:
    fields: set[str] = {field.name for field in dataclasses.fields(config_class)}
    return fields - _OF_A_CHECKPOINT | _NOT_OF_FIELDS


def read_weights(header: GgufHeader, config: PretrainedConfig, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Yield name and tensor of all weights of a model that gqaprune wrote, with one tensor of the file in memory.

    Raises:
        ValueError: if the rows of heads do not fit the config.
        NotImplementedError: if a tensor's type cannot be read.
    """
    geometry, architecture = read_geometry(config), header.metadata["general.architecture"]
    for name in header.tensors:
        unpacked = unpack_tensor(name, read_tensor(header, name), geometry, architecture)
        yield from ((own_name, tensor.to(dtype)) for own_name, tensor in unpacked.items())


def read_tokenizer(header: GgufHeader) -> PreTrainedTokenizerFast:
    """Rebuild the tokenizer of a file of any architecture.

    Raises:
        ValueError: if its parts do not fit together.
    """
    architecture, parts, settings = get_gguf_tokenizer(str(header.path))
    try:
        backend, _ = convert_gguf_tokenizer(architecture, parts)
    except Exception as error:  # tokenizers raises plain Exceptions
        raise ValueError(first_line(error)) from None
    if parts.get("pre_tokenizer_type") == "smollm":  # transformers treats it as plain byte-level
        steps = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=backend, **settings)
