"""How fast a device is, tried for a moment: products in each type, its memory, and the way to the host."""

import time
from collections.abc import Callable, Sequence

import torch

from gqaprune.common.precision import find_double_device, multiply_exactly
from gqaprune.planning.costs.device import Device

_SIZES = {"cpu": 512}
"""Rows and columns of the matrices that are multiplied: small ones are done before other work on the cores disturbs."""
_SIZE = 4096
"""The same on other devices, which small ones do not fill."""
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
        size = _SIZES.get(device.type, _SIZE)
        where = find_double_device(device) if of == torch.float64 else device
        left, right = (torch.ones(size, size, device=where, dtype=of) for _ in range(2))
        return 2 * size**3 * _count_per_second(lambda: left @ right, seconds)

    kinds = {of: measure_products(of) for of in {dtype, torch.float32, torch.float64}}
    source = torch.ones(_COPIED, dtype=torch.uint8, device=device)
    target, host = torch.empty_like(source), torch.empty_like(source, device="cpu")
    bandwidth = 2 * _COPIED * _count_per_second(lambda: target.copy_(source), seconds)
    to_host = float("inf")
    if device.type != "cpu":
        to_host = _COPIED * _count_per_second(lambda: host.copy_(source), seconds)
    speeds = kinds[dtype], kinds[torch.float32], kinds[torch.float64]
    return Device(str(device), *speeds, bandwidth, to_host, read_memory(device))


def read_memory(device: torch.device) -> float:
    """Bytes that a GPU has free; infinite where the host works itself."""
    return float(torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else float("inf")


def _count_per_second(work: Callable[[], torch.Tensor], seconds: float) -> float:
    """Calls in a second, each waited for, by the fastest of some: other work on the machine disturbs."""
    work().flatten()[0].item()
    durations, began = list[float](), time.perf_counter()
    while len(durations) < 2 or time.perf_counter() - began < seconds:
        start = time.perf_counter()
        work().flatten()[0].item()
        durations.append(time.perf_counter() - start)
    return 1 / min(durations)


def show_time(seconds: float) -> str:
    """Seconds, minutes or hours, in two figures."""
    units: Sequence[tuple[float, str]] = ((3600, "h"), (60, "min"), (1, "s"))
    size, unit = next(((size, unit) for size, unit in units if seconds >= size), units[-1])
    count = seconds / size
    return f"{count:,.0f} {unit}" if count >= 100 else f"{count:.2g} {unit}"
