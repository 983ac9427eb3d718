"""Helpers for torch.distributed; every function also works without a process group."""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

K = TypeVar("K")


def get_rank_and_world_size() -> tuple[int, int]:
    """Return rank and size of the default process group, `(0, 1)` without one."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def sum_across_ranks(tensors: Mapping[K, Tensor]) -> dict[K, Tensor]:
    """Add tensors over all ranks in one reduction; every rank gets the same bits.

    A backend adds each number up in one place and then passes the sum on, in rings and in trees: weights under DDP stay
    alike on all ranks for the same reason.

    Args:
        tensors: the same keys and shapes on every rank, one device and dtype.
    """
    if get_rank_and_world_size()[1] == 1:
        return dict(tensors)
    flat = torch.cat([tensor.flatten() for tensor in tensors.values()])
    dist.all_reduce(flat)
    pieces = flat.split([tensor.numel() for tensor in tensors.values()])
    return {key: piece.view_as(tensor) for (key, tensor), piece in zip(tensors.items(), pieces, strict=True)}


def add_across_ranks(tensors: Iterable[Tensor], device: torch.device) -> None:
    """Add tensors over all ranks in place, one after the other; every rank gets the same bits.

    Args:
        tensors: tensors with the same shapes on every rank; they may be on another device.
        device: device that the process group reduces on.
    """
    if get_rank_and_world_size()[1] > 1:
        for tensor in tensors:
            tensor.copy_(sum_across_ranks({"sum": tensor.to(device)})["sum"])


def copy_from_first_rank(tensor: Tensor) -> None:
    """Overwrite a tensor with that of rank 0, in place."""
    if get_rank_and_world_size()[1] > 1:
        sent = tensor.detach().contiguous()
        dist.broadcast(sent, src=0)
        tensor.copy_(sent)


def take_from_rank_0(read: Callable[[], Sequence[Tensor]], device: torch.device) -> list[Tensor]:
    """Read tensors on rank 0 only, and return them on every rank.

    Args:
        read: returns integer matrices on the CPU.
        device: device that the process group reduces on.

    Raises:
        ValueError: on every rank, with rank 0's message.
    """
    rank, world_size = get_rank_and_world_size()
    if world_size == 1:
        return list(read())
    tensors: list[Tensor] = []
    sentence = b""
    if rank == 0:
        try:
            found = list(read())
            tensors = [torch.tensor([tensor.shape for tensor in found]), *found]
        except ValueError as error:
            sentence = str(error).encode()
    sizes = _broadcast(torch.tensor([len(sentence), len(tensors) - 1]), 2, device)
    if length := int(sizes[0]):
        raise ValueError(bytes(_broadcast(torch.tensor(list(sentence)), length, device).tolist()).decode())
    count = int(sizes[1])
    shapes = _broadcast(tensors[0].flatten() if tensors else None, 2 * count, device).view(count, 2).tolist()
    return [
        _broadcast(tensors[index].flatten() if tensors else None, rows * columns, device).view(rows, columns)
        for index, (rows, columns) in enumerate(shapes, 1)
    ]


def _broadcast(numbers: Tensor | None, length: int, device: torch.device) -> Tensor:
    """Return rank 0's integers on the CPU of every rank; those of other ranks are ignored."""
    is_first = get_rank_and_world_size()[0] == 0
    sent = numbers.long() if is_first and numbers is not None else torch.zeros(length, dtype=torch.long)
    sent = sent.to(device)
    dist.broadcast(sent, src=0)
    return sent.cpu()


def reduce_to_largest(numbers: Tensor) -> list[int]:
    """Return the largest value of each integer over all ranks; waits for the device and the other ranks."""
    if get_rank_and_world_size()[1] > 1:
        dist.all_reduce(numbers, dist.ReduceOp.MAX)
    return [int(number) for number in numbers.tolist()]


def is_true_anywhere(flag: bool, device: torch.device) -> bool:
    """Return whether a flag is set on any rank, so that all ranks stop together instead of waiting for one another."""
    return bool(sum_across_ranks({"flag": torch.tensor(float(flag), device=device)})["flag"] > 0)


def check_same_on_all_ranks(what: str, key: str, device: torch.device) -> None:
    """Raise an error on all ranks if something differs between a rank and rank 0; every rank must call it.

    Args:
        what: name of the thing, for the error.
        key: text that must be the same on all ranks.
        device: device that the process group reduces on.

    Raises:
        ValueError: on every rank, with the ranks that differ.
    """
    rank, world_size = get_rank_and_world_size()
    if world_size == 1:
        return
    digest = torch.tensor(list(hashlib.sha256(key.encode()).digest()))
    digests = torch.zeros(world_size, len(digest), dtype=digest.dtype)
    digests[rank] = digest
    digests = sum_across_ranks({"digests": digests.to(device)})["digests"]
    if others := [other for other in range(world_size) if not digests[other].equal(digests[0])]:
        raise ValueError(
            f"{what} of rank {', '.join(map(str, others))} differ from rank 0's, of {world_size} ranks: use the same "
            "files, package versions and kind of device for all ranks, or set trainer.devices to 1"
        )
