"""Whether the tensors in safetensors files are those of a config: types and sizes, from their headers alone.

What a config says of types is not believed: weights in 8 bits that are read as if they were whole ones make a model out
of its senses, without an error.
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
"""What safetensors calls the types that models compute in."""
_PACKED = 32
"""Weights that one value of another type holds at most."""
_MORE_LAYERS, _MORE_WEIGHTS = 64, 2**24
"""Beyond twice what files hold, what a config may still promise: building that takes no time and no memory, and the
tensors that are missing or have another shape are named then."""


@dataclass(frozen=True)
class StoredInfo:
    """What a header says of a tensor: its type in safetensors' words, and its shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def most_weights(self) -> int:
        """Weights that it can hold."""
        return prod(self.shape) * (1 if self.dtype in PLAIN else _PACKED)


def read_infos(files: Mapping[str, Path]) -> dict[str, StoredInfo]:
    """Type and shape of every tensor; name -> file, as `sources.find_tensors` finds them."""
    infos = {}
    for path in sorted(set(files.values())):
        with safe_open(path, "pt") as file:
            for name in sorted(file.keys()):
                piece = file.get_slice(name)
                infos[name] = StoredInfo(piece.get_dtype(), tuple(piece.get_shape()))
    return infos


def find_stored_type(infos: Mapping[str, StoredInfo]) -> torch.dtype | None:
    """The type that most weights are stored in; None where no tensor is of a type that models compute in."""
    sizes = dict.fromkeys(PLAIN, 0)
    for info in infos.values():
        if info.dtype in sizes:
            sizes[info.dtype] += prod(info.shape)
    largest = max(sizes, key=lambda dtype: sizes[dtype])
    return PLAIN[largest] if sizes[largest] else None


def read_quantization(config: PretrainedConfig) -> str:
    """The method that a config says its weights are quantised by; empty where it says of none."""
    settings = getattr(config, "quantization_config", None)
    if not settings:
        return ""
    method = settings.get("quant_method") if isinstance(settings, dict) else getattr(settings, "quant_method", None)
    return str(getattr(method, "value", method))


def check_types(infos: Mapping[str, StoredInfo], config: PretrainedConfig) -> None:
    """Refuse tensors of types that the config does not explain, and a config that explains what is not there.

    Raises:
        ValueError: naming the first such tensor and its type.
    """
    odd = [name for name, info in infos.items() if info.dtype not in PLAIN]
    quantization = read_quantization(config)
    if odd and quantization not in AUTO_QUANTIZER_MAPPING:
        raise ValueError(
            f"{min(odd)} is stored as {infos[min(odd)].dtype} ({len(odd)} such tensors in all), which its config.json "
            f"does not explain; weights are read in {', '.join(PLAIN)}: give the model in one of them"
        )
    if quantization and not odd:
        raise ValueError(
            f"its config.json has a quantization_config ({quantization}), but its weights are plain: remove that "
            "setting from the file"
        )


def check_companions(names: Collection[str], model: PreTrainedModel) -> None:
    """Refuse tensors that change what the weights beside them mean, such as `weight_scale_inv`, and are not read.

    Args:
        names: of all stored tensors, or of those that were not read.
        model: that they are for; its parameters may have no values.

    Raises:
        ValueError: naming the first.
    """
    prefix = f"{model.base_model_prefix}."  # which files that were saved without the head lack
    known = {short for name in model.state_dict() for short in (name, name.removeprefix(prefix))}
    owners = {name.removeprefix(prefix).rpartition(".")[0] for name, _ in model.named_parameters()}
    owners |= {prefix + owner for owner in owners}
    if strange := sorted(name for name in set(names) - known if name.rpartition(".")[0] in owners):
        raise ValueError(
            f"its files hold {strange[0]} ({len(strange)} in all), which its config has no place for: without it the "
            "weights beside it may mean something else"
        )


def check_loaded(model: PreTrainedModel) -> None:
    """Refuse plain parameters of whole numbers: a config that names another quantisation than the files'.

    Raises:
        ValueError: naming the first.
    """
    for name, parameter in model.named_parameters():
        if type(parameter) is nn.Parameter and not parameter.is_floating_point():
            raise ValueError(
                f"{name} is stored as {name_dtype(parameter.dtype)}, which the quantization_config of its config.json "
                "does not explain: give the model unquantised"
            )


def check_layer_count(infos: Mapping[str, StoredInfo], config: PretrainedConfig) -> None:
    """Refuse a config of far more decoder layers than its files hold, before anything is built from it.

    Raises:
        ValueError: with both numbers.
    """
    layers = get_family(config).layers
    names = (layers, layers.rpartition(".")[2])  # the second of what was saved without the head
    found = {find_layer(name, one) for name in infos for one in names if name.startswith(f"{one}.")}
    count = max((index + 1 for index in found if index is not None), default=0)
    if config.num_hidden_layers > 2 * count + _MORE_LAYERS:
        raise ValueError(f"its config promises {config.num_hidden_layers} layers, its files hold {count}")


def check_total(stored: int, model: PreTrainedModel) -> None:
    """Refuse a model far larger than all that its files can hold, before memory is taken for it.

    Raises:
        ValueError: with both sizes.
    """
    promised = sum(parameter.numel() for parameter in model.parameters())
    if promised > 2 * stored + _MORE_WEIGHTS:
        raise ValueError(f"its config promises {promised:,} parameters, its files hold {stored:,}")
