"""Hash models and tensors, so that a stage knows what it depends on."""

import hashlib
import json
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from gqaprune.placement.layer_store import find_store

_RUN = 2**16
"""Values whose bits are summed together: 32 bits times a place in it, added up, stay below 2^63."""


_WHOLE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int32}
"""Bytes of a value -> whole numbers as wide, or two of them."""


def hash_model(model: PreTrainedModel, settings: Sequence[object] = ()) -> str:
    """A key for what depends on a model: a hash of its config, of every weight, and of the settings."""
    config = {name: value for name, value in model.config.to_dict().items() if not name.startswith("_")}
    content = hashlib.sha256(json.dumps([config, list(settings)], sort_keys=True, default=str).encode())
    for _, parameter in find_store(model).named_parameters():
        weights = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        content.update(str((weights.shape, weights.dtype)).encode())
        content.update(_sum_bits(weights.detach()).cpu().numpy().tobytes())
    return content.hexdigest()[:32]


def _sum_bits(values: Tensor) -> Tensor:
    """The bits of each 65,536 values as whole numbers, times their places, summed.

    Exact, unlike a sum of floats: the same on every device and any number of threads.
    """
    bits = values.flatten().view(_WHOLE[values.element_size()])
    places = torch.arange(1, _RUN + 1, device=values.device)
    return torch.stack([(run * places[: len(run)]).sum() for run in bits.split(_RUN)])


def hash_tensors(tensors: Sequence[Tensor]) -> str:
    """A key for what depends on tensors, and on how they are divided."""
    content = hashlib.sha256()
    for tensor in tensors:
        content.update(str((tensor.shape, tensor.dtype)).encode() + tensor.cpu().numpy().tobytes())
    return content.hexdigest()[:32]
