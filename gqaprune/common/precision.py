"""Products as exact as the types of their operands, whatever a user has allowed for speed in training."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

_DEVICES = ("cpu", "cuda", "mps", "xpu")


@contextmanager
def multiply_exactly() -> Iterator[None]:
    """Multiply float32 in float32 while the context lasts: no TF32, no bfloat16 within oneDNN, no autocast.

    These settings belong to a process, so a script or trainer that wants them in training has them wherever something
    is measured, too. Decorates every function that scores, measures, cuts or fits, so that what it gives depends on
    model, text and settings alone.
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
    """Make new tensors of a type while the context lasts, whatever a trainer builds modules in."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _read_precision() -> tuple[str | None, dict[str, str]]:
    """What torch may do with float32, by its old setting and by its new ones, which torch before 2.9 has not."""
    matmuls = {"cuda": torch.backends.cuda.matmul, "mkldnn": getattr(torch.backends.mkldnn, "matmul", None)}
    values = {name: getattr(matmul, "fp32_precision", None) for name, matmul in matmuls.items()}
    try:
        overall = torch.get_float32_matmul_precision()
    except RuntimeError:  # the new ones say what it cannot
        overall = None
    return overall, {name: value for name, value in values.items() if value is not None}


def _restore(overall: str | None, values: dict[str, str]) -> None:
    if overall is not None:
        torch.set_float32_matmul_precision(overall)
    for name, value in values.items():
        matmul = getattr(torch.backends, name).matmul
        matmul.fp32_precision = "none"  # which follows the setting above it
        if matmul.fp32_precision != value:
            matmul.fp32_precision = value
