"""Random numbers of training steps, the same in a run that was stopped and resumed."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def seed_by_place(device: torch.device, *place: int) -> Iterator[None]:
    """Seed torch by the run's seed and a place in the run while the context lasts, then restore its state.

    Args:
        device: whose random numbers are drawn, beside the CPU's.
        place: numbers that tell one step of one rank from all others.
    """
    with torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type):
        content = hashlib.sha256(repr((torch.initial_seed(), *place)).encode()).digest()
        torch.manual_seed(int.from_bytes(content[:7], "big"))
        yield
