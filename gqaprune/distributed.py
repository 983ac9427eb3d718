"""What the core needs of torch.distributed; every function also works without a process group."""

from collections.abc import Mapping
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

K = TypeVar("K")


def get_rank_and_world_size() -> tuple[int, int]:
    """Rank and size of the default process group, `(0, 1)` without one."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def sum_across_ranks(tensors: Mapping[K, Tensor]) -> dict[K, Tensor]:
    """Add tensors over all ranks in one reduction; every rank gets the same bits.

    Args:
        tensors: the same keys and shapes on every rank, one device and dtype.
    """
    if get_rank_and_world_size()[1] == 1:
        return dict(tensors)
    flat = torch.cat([tensor.flatten() for tensor in tensors.values()])
    dist.all_reduce(flat)
    dist.broadcast(flat, src=0)
    pieces = flat.split([tensor.numel() for tensor in tensors.values()])
    return {key: piece.view_as(tensor) for (key, tensor), piece in zip(tensors.items(), pieces, strict=True)}


def is_true_anywhere(flag: bool, device: torch.device) -> bool:
    """Whether a flag is set on any rank, so that all of them stop together instead of waiting for one another."""
    return bool(sum_across_ranks({"flag": torch.tensor(float(flag), device=device)})["flag"] > 0)
