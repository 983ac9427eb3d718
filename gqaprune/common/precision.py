"""Compute products in full precision whatever a user has allowed for speed in training, and sums in float64.

Apple's GPUs have no float64: what is summed or solved in it is moved to the host there.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

_DEVICES = ("cpu", "cuda", "mps", "xpu")
_WITHOUT_DOUBLE = ("mps",)
"""Types of devices that have no float64."""


@contextmanager
def multiply_exactly() -> Iterator[None]:
    """Multiply float32 matrices in float32 within the context: no TF32, no bfloat16 in oneDNN, no autocast.

    These settings apply to the whole process, so a script or trainer that sets them for training would also change
    measurements. This decorates every function that scores, measures, cuts or fits, so that its result depends only on
    model, text and settings.
    """
    with ExitStack() as restored:
        for device in _DEVICES:
            if torch.is_autocast_enabled(device):
                restored.enter_context(torch.autocast(device, enabled=False))
        restored.callback(_restore, *_read_precision())
        torch.set_float32_matmul_precision("highest")
        yield


@contextmanager
def use_default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Use a type for new tensors within the context, whatever type a trainer builds modules in."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def find_double_device(device: torch.device) -> torch.device:
    """Return where a device's numbers are computed with in float64: there, or on the host."""
    return torch.device("cpu") if device.type in _WITHOUT_DOUBLE else device


def to_double(tensor: Tensor) -> Tensor:
    """Convert to float64, where the tensor's device computes in it."""
    return tensor.to(find_double_device(tensor.device)).double()  # moved first: the device cannot convert


def sum_in_double(tensor: Tensor, dim: int | None = None) -> Tensor:
    """Sum in float64, over one dimension or all, where the tensor's device computes in it."""
    return tensor.to(find_double_device(tensor.device)).sum(dim, dtype=torch.float64)


def _read_precision() -> tuple[str | None, dict[str, str]]:
    """Read torch's float32 precision, from its old setting and from the new ones, which exist since torch 2.9."""
    matmuls = {"cuda": torch.backends.cuda.matmul, "mkldnn": getattr(torch.backends.mkldnn, "matmul", None)}
    values = {name: getattr(matmul, "fp32_precision", None) for name, matmul in matmuls.items()}
    try:
        overall = torch.get_float32_matmul_precision()
    except RuntimeError:  # the new settings have a value that the old one cannot express
        overall = None
    return overall, {name: value for name, value in values.items() if value is not None}


def _restore(overall: str | None, values: dict[str, str]) -> None:
    if overall is not None:
        torch.set_float32_matmul_precision(overall)
    for name, value in values.items():
        matmul = getattr(torch.backends, name).matmul
        matmul.fp32_precision = "none"  # follows the more general setting
        if matmul.fp32_precision != value:
            matmul.fp32_precision = value
