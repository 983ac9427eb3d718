"""Check, from headers alone, that types and sizes of tensors in safetensors files fit a config.

The types in a config are not trusted: a model whose 8-bit weights are read as plain ones produces nonsense without an
error.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

from gqaprune.models.architecture import find_layer
from gqaprune.models.dtypes import name_dtype
from gqaprune.models.families import get_family

PLAIN = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""Names in safetensors of the types that models compute in."""
_PACKED = 32
"""Largest number of weights in one value of another type."""
_MORE_LAYERS, _MORE_WEIGHTS = 64, 2**24
"""Layers and weights that a config may have beyond twice those in files: building them takes no time or memory, and
then tensors that are missing or have another shape can be named."""


@dataclass(frozen=True)
class StoredInfo:
    """A tensor's entry in a header: its type, as named by safetensors, and its shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def most_weights(self) -> int:
        """Largest number of weights in the tensor."""
        return prod(self.shape) * (1 if self.dtype in PLAIN else _PACKED)


def read_infos(files: Mapping[str, Path]) -> dict[str, StoredInfo]:
    """Read type and shape of every tensor; `files` is name -> file, from `sources.find_tensors`."""
    infos = {}
    for path in sorted(set(files.values())):
        with safe_open(path, "pt") as file:
            for name in sorted(file.keys()):
                piece = file.get_slice(name)
                infos[name] = StoredInfo(piece.get_dtype(), tuple(piece.get_shape()))
    return infos


def find_stored_type(infos: Mapping[str, StoredInfo]) -> torch.dtype | None:
    """Find the type of most stored weights; None if no tensor has a type that models compute in."""
    sizes = dict.fromkeys(PLAIN, 0)
    for info in infos.values():
        if info.dtype in sizes:
            sizes[info.dtype] += prod(info.shape)
    largest = max(sizes, key=lambda dtype: sizes[dtype])
    return PLAIN[largest] if sizes[largest] else None


def read_quantization(config: PretrainedConfig) -> str:
    """Read the quantisation method in a config; empty if there is none."""
    settings = getattr(config, "quantization_config", None)
    if not settings:
        return ""
    method = settings.get("quant_method") if isinstance(settings, dict) else getattr(settings, "quant_method", None)
    return str(getattr(method, "value", method))


def check_types(infos: Mapping[str, StoredInfo], config: PretrainedConfig) -> None:
    """Raise an error if the config does not explain the types of tensors, or has a quantisation that they lack.

    Raises:
        ValueError: with the first such tensor and its type.
    """
    odd = [name for name, info in infos.items() if info.dtype not in PLAIN]
    quantization = read_quantization(config)
    if odd and quantization not in AUTO_QUANTIZER_MAPPING:
        raise ValueError(
            f"{min(odd)} is stored as {infos[min(odd)].dtype} ({len(odd)} such tensors in all), which its config.json "
            f"does not explain: use a model with weights in {', '.join(PLAIN)}"
        )
    if quantization and not odd:
        raise ValueError(
            f"its config.json has a quantization_config ({quantization}), but its weights are plain: remove that "
            "setting from the file"
        )


def check_companions(names: Collection[str], model: PreTrainedModel) -> None:
    """Raise an error for tensors that are not read and change the meaning of weights, such as `weight_scale_inv`.

    Args:
        names: names of all stored tensors, or of those that were not read.
        model: their model; its parameters may have no values.

    Raises:
        ValueError: with the first such tensor.
    """
    prefix = f"{model.base_model_prefix}."  # missing in files that were saved without the head
    known = {short for name in model.state_dict() for short in (name, name.removeprefix(prefix))}
    owners = {name.removeprefix(prefix).rpartition(".")[0] for name, _ in model.named_parameters()}
    owners |= {prefix + owner for owner in owners}
    if strange := sorted(name for name in set(names) - known if name.rpartition(".")[0] in owners):
        raise ValueError(
            f"its files have {strange[0]} ({len(strange)} in all), which does not fit the config: without it the "
            "weights beside it may have another meaning"
        )


def check_loaded(model: PreTrainedModel) -> None:
    """Raise an error for plain parameters of whole numbers, which mean that config and files disagree on quantisation.

    Raises:
        ValueError: with the first such parameter.
    """
    for name, parameter in model.named_parameters():
        if type(parameter) is nn.Parameter and not parameter.is_floating_point():
            raise ValueError(
                f"{name} is stored as {name_dtype(parameter.dtype)}, which the quantization_config of its config.json "
                "does not explain: use the unquantised model"
            )


def check_layer_count(infos: Mapping[str, StoredInfo], config: PretrainedConfig) -> None:
    """Raise an error if a config has far more decoder layers than its files, before anything is built from it.

    Raises:
        ValueError: with both numbers.
    """
    layers = get_family(config).layers
    names = (layers, layers.rpartition(".")[2])  # the second for models that were saved without the head
    found = {find_layer(name, one) for name in infos for one in names if name.startswith(f"{one}.")}
    count = max((index + 1 for index in found if index is not None), default=0)
    if config.num_hidden_layers > 2 * count + _MORE_LAYERS:
        raise ValueError(f"its config says {config.num_hidden_layers} layers, but its files have {count}")


def check_total(stored: int, model: PreTrainedModel) -> None:
    """Raise an error if a model is far larger than its files, before memory is allocated.

    Raises:
        ValueError: with both sizes.
    """
    promised = sum(parameter.numel() for parameter in model.parameters())
    if promised > 2 * stored + _MORE_WEIGHTS:
        raise ValueError(f"its config needs {promised:,} parameters, but its files have {stored:,}")
