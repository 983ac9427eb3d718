"""Keep torch from instructions that a CPU announces but does not support, and check whether bfloat16 is fast."""

import faulthandler
import functools
import os
import signal
import time
from collections.abc import Callable

import torch

SETTING = "ONEDNN_MAX_CPU_ISA"
"""Environment variable that oneDNN, torch's library of matrix products on CPUs, reads before its first product."""
_WORTH = 0.75
"""Largest share of float32's time at which a product in bfloat16 is worth its rounding."""
_TRIES = 5


def _multiply_bfloat16() -> None:
    torch.ones(16, 64, dtype=torch.bfloat16) @ torch.ones(64, 32, dtype=torch.bfloat16)


def avoid_illegal_instructions(compute: Callable[[], object] = _multiply_bfloat16) -> None:
    """Try a product of bfloat16 matrices in a child process; if that is killed, turn off matrix tiles in oneDNN.

    Some virtual machines announce these tiles (AMX), but using them is an illegal instruction. Call this before any
    other work; it does nothing if there are no tiles or the user has set the instructions of oneDNN.

    Args:
        compute: function to try.
    """
    if SETTING in os.environ or not torch.cpu.get_capabilities().get("amx_bf16"):
        return
    child = os.fork()
    if child == 0:
        faulthandler.disable()
        try:
            compute()
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGILL:
        os.environ[SETTING] = "AVX512_CORE_FP16"


@functools.cache
def is_faster_in_bfloat16() -> bool:
    """Return whether this CPU multiplies matrices clearly faster in bfloat16 than in float32, measured once.

    The announced instructions do not tell: without matrix tiles, one CPU was 4.5 times as fast as in float32 and
    another half as fast.
    """
    return _time_product(torch.bfloat16) < _WORTH * _time_product(torch.float32)


def _time_product(dtype: torch.dtype) -> float:
    """Time a product of matrices of a small MLP's size, in seconds; the fastest of several, to exclude other work."""
    left, right = torch.ones(512, 512, dtype=dtype), torch.ones(512, 512, dtype=dtype)

    def multiply() -> float:
        start = time.perf_counter()
        left @ right
        return time.perf_counter() - start

    return min(multiply() for _ in range(_TRIES))
