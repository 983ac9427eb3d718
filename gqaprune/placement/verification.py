"""Verify that written files have the right tensors, by reading them from the disk one by one."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor

from gqaprune.models.sources import find_tensors

_WHOLE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Bytes of a value -> type of whole numbers of the same size, to compare bits: NaNs are not equal to themselves."""


def check_tensors(expected: Mapping[str, Tensor], files: Mapping[str, Path]) -> None:
    """Check names, shapes, types and every bit of tensors in safetensors files, with one in memory at a time.

    Args:
        expected: name -> tensor; values of those that are not whole in memory (on `meta` or in shards) are not checked.
        files: name -> file that should have it.

    Raises:
        ValueError: with the first tensor that is missing or different.
    """
    if missing := sorted(expected.keys() - files.keys()):
        raise ValueError(f"the files written lack {missing[0]} ({len(missing)} in all): save the model again")
    for path in sorted({files[name] for name in expected}):
        with safe_open(path, "pt") as file:
            held = set(file.keys())
            for name, tensor in expected.items():
                if files[name] == path and not (name in held and _is_same(tensor.detach(), file.get_tensor(name))):
                    raise ValueError(
                        f"{name} in {path.name} differs from the model: the disk is full or faulty, or the model "
                        "changed while it was saved; save it again"
                    )


def check_checkpoint(expected: Mapping[str, Tensor], folder: Path) -> None:
    """Check the tensors in the safetensors files of a folder, as loading finds them.

    Args:
        expected: name -> tensor, as for `check_tensors`.
        folder: the checkpoint.

    Raises:
        ValueError: like `check_tensors`, or if the folder has no weights.
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
