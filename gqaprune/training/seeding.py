"""Random numbers of training steps, the same in a run that was stopped and resumed."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

_DROPOUT = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)
_NOISE = ("dropout", "pdrop", "jitter_noise")
"""How names of settings end by which a model in training draws random numbers without a module for it."""


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


def draws_random_numbers(model: nn.Module) -> bool:
    """Whether a model in training draws random numbers: of dropout, adapters' too, or of a router's noise."""
    if any(isinstance(module, _DROPOUT) and module.p > 0 for module in model.modules()):
        return True
    config = getattr(model, "config", None)
    settings = vars(config) if config is not None else {}
    return any(name.endswith(_NOISE) and isinstance(value, float) and value > 0 for name, value in settings.items())
