"""Hash models and tensors, to identify the inputs of a stage."""

import hashlib
import json
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from gqaprune.placement.layer_store import find_store

_RUN = 2**16
"""Number of values whose bits are summed together: the sum of 32 bits times their places stays below 2^63."""


_WHOLE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int32}
"""Bytes of a value -> type of whole numbers of the same size, or of half the size."""


def hash_model(model: PreTrainedModel, settings: Sequence[object] = ()) -> str:
    """Hash a model's config and every weight, together with settings, as a key for results that depend on them."""
    config = {name: value for name, value in model.config.to_dict().items() if not name.startswith("_")}
    content = hashlib.sha256(json.dumps([config, list(settings)], sort_keys=True, default=str).encode())
    for _, parameter in find_store(model).named_parameters():
        weights = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        content.update(str((weights.shape, weights.dtype)).encode())
        content.update(_sum_bits(weights.detach()).cpu().numpy().tobytes())
    return content.hexdigest()[:32]


def _sum_bits(values: Tensor) -> Tensor:
    """Sum the bits of each 65,536 values as whole numbers, times their places.

    Unlike a sum of floats, this is exact, so it is the same on every device and with any number of threads.
    """
    bits = values.flatten().view(_WHOLE[values.element_size()])
    places = torch.arange(1, _RUN + 1, device=values.device)
    return torch.stack([(run * places[: len(run)]).sum() for run in bits.split(_RUN)])


def hash_tensors(tensors: Sequence[Tensor]) -> str:
    """Hash tensors, as a key for results that depend on them and on how they are divided."""
    content = hashlib.sha256()
    for tensor in tensors:
        content.update(str((tensor.shape, tensor.dtype)).encode() + tensor.cpu().numpy().tobytes())
    return content.hexdigest()[:32]
