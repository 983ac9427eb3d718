"""Whether files hold what was to be written to them, tensor by tensor, as they are read from the disk."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor

from gqaprune.models.sources import find_tensors

_WHOLE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Bytes of a value -> whole numbers as wide, which are equal where bits are: NaNs are not equal to themselves."""


def check_tensors(expected: Mapping[str, Tensor], files: Mapping[str, Path]) -> None:
    """Check that safetensors files hold tensors with names, shapes, types and every bit; one at a time is in memory.

    Args:
        expected: name -> tensor; of one that is not whole in memory, on `meta` or in shards, the values are left out.
        files: name -> file that should hold it.

    Raises:
        ValueError: naming the first tensor that is not there as it should be.
    """
    if missing := sorted(expected.keys() - files.keys()):
        raise ValueError(f"the files written lack {missing[0]} ({len(missing)} in all): save the model again")
    for path in sorted({files[name] for name in expected}):
        with safe_open(path, "pt") as file:
            held = set(file.keys())
            for name, tensor in expected.items():
                if files[name] == path and not (name in held and _is_same(tensor.detach(), file.get_tensor(name))):
                    raise ValueError(
                        f"{name} is not in {path.name} as it is in memory: the disk is full or faulty, or the model "
                        "changed meanwhile; save it again"
                    )


def check_checkpoint(expected: Mapping[str, Tensor], folder: Path) -> None:
    """Check that the safetensors files of a folder hold tensors, as loading finds them.

    Args:
        expected: as for `check_tensors`.
        folder: the checkpoint.

    Raises:
        ValueError: as `check_tensors`, or if the folder holds no weights.
    """
    check_tensors(expected, find_tensors(folder))


def _is_same(tensor: Tensor, stored: Tensor) -> bool:
    if (tensor.shape, tensor.dtype) != (stored.shape, stored.dtype):
        return False
    if tensor.is_meta or isinstance(tensor, DTensor):
        return True
    return torch.equal(_view_bits(tensor.cpu()), _view_bits(stored))


def _view_bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(_WHOLE[tensor.element_size()])
