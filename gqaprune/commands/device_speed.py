"""How fast a device is, tried for a moment: products in each type, its memory, and the way to the host."""

import time
from collections.abc import Callable, Sequence

import torch

from gqaprune.common.precision import multiply_exactly
from gqaprune.planning.costs.device import Device

_SIZE = 1024
"""Rows and columns of the matrices that are multiplied."""
_COPIED = 2**26
"""Bytes that are copied: more than caches hold."""


@multiply_exactly()
def measure_device(device: torch.device, dtype: torch.dtype, seconds: float = 0.1) -> Device:
    """Speeds of a device for a model's type.

    Args:
        device: that works.
        dtype: of the model's weights.
        seconds: that each speed is tried for.
    """

    def measure_products(of: torch.dtype) -> float:
        left, right = (torch.ones(_SIZE, _SIZE, device=device, dtype=of) for _ in range(2))
        return 2 * _SIZE**3 * _count_per_second(lambda: left @ right, seconds)

    kinds = {of: measure_products(of) for of in {dtype, torch.float32, torch.float64}}
    source = torch.ones(_COPIED, dtype=torch.uint8, device=device)
    target, host = torch.empty_like(source), torch.empty_like(source, device="cpu")
    bandwidth = 2 * _COPIED * _count_per_second(lambda: target.copy_(source), seconds)
    to_host = float("inf")
    if device.type != "cpu":
        to_host = _COPIED * _count_per_second(lambda: host.copy_(source), seconds)
    return Device(str(device), kinds[dtype], kinds[torch.float32], kinds[torch.float64], bandwidth, to_host)


def _count_per_second(work: Callable[[], torch.Tensor], seconds: float) -> float:
    """Calls in a second, the first left out, each waited for."""
    work().flatten()[0].item()
    count, began = 0, time.perf_counter()
    while count < 2 or time.perf_counter() - began < seconds:
        work().flatten()[0].item()
        count += 1
    return count / (time.perf_counter() - began)


def show_time(seconds: float) -> str:
    """Seconds, minutes or hours, in two figures."""
    units: Sequence[tuple[float, str]] = ((3600, "h"), (60, "min"), (1, "s"))
    size, unit = next(((size, unit) for size, unit in units if seconds >= size), units[-1])
    count = seconds / size
    return f"{count:,.0f} {unit}" if count >= 100 else f"{count:.2g} {unit}"
