"""Seed training steps so that a resumed run draws the same random numbers."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

_DROPOUT = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)
_NOISE = ("dropout", "pdrop", "jitter_noise")
"""Endings of config settings that make a model draw random numbers in training without a dropout module."""


@contextmanager
def seed_by_place(device: torch.device, *place: int) -> Iterator[None]:
    """Seed torch with the run's seed and a place in the run within the context, then restore its state.

    Args:
        device: device to seed, besides the CPU.
        place: numbers that identify one step of one rank.
    """
    with torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type):
        content = hashlib.sha256(repr((torch.initial_seed(), *place)).encode()).digest()
        torch.manual_seed(int.from_bytes(content[:7], "big"))
        yield


def draws_random_numbers(model: nn.Module) -> bool:
    """Return whether a model in training draws random numbers, for dropout (also of adapters) or a router's noise."""
    if any(isinstance(module, _DROPOUT) and module.p > 0 for module in model.modules()):
        return True
    config = getattr(model, "config", None)
    settings = vars(config) if config is not None else {}
    return any(name.endswith(_NOISE) and isinstance(value, float) and value > 0 for name, value in settings.items())
