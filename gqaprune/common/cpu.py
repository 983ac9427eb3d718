"""Keeps torch off instructions that a processor announces and does not run, at which the process would be killed.

And says what is left: whether products in bfloat16 are worth it.
"""

import faulthandler
import functools
import os
import signal
import time
from collections.abc import Callable

import torch

SETTING = "ONEDNN_MAX_CPU_ISA"
"""Environment variable that oneDNN, torch's library of products on CPUs, reads before its first one."""
_WORTH = 0.75
"""Share of float32's seconds that a product in bfloat16 takes at most where it is worth its rounding."""
_TRIES = 5


def _multiply_bfloat16() -> None:
    torch.ones(16, 64, dtype=torch.bfloat16) @ torch.ones(64, 32, dtype=torch.bfloat16)


def avoid_illegal_instructions(compute: Callable[[], object] = _multiply_bfloat16) -> None:
    """Try a product of bfloat16 matrices in a child process; if that is killed, let oneDNN do without matrix tiles.

    Some virtual machines announce those tiles (AMX), and oneDNN's use of them is an illegal instruction there. Comes
    before any other work, and does nothing where there are no tiles or the user has set what oneDNN may use.

    Args:
        compute: what is tried.
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
    """Whether this processor multiplies matrices in bfloat16 clearly faster than in float32, as tried once.

    What a processor announces does not say: without matrix tiles, one was seen at 4.5 times the speed of float32 and
    another at half of it.
    """
    return _time_product(torch.bfloat16) < _WORTH * _time_product(torch.float32)


def _time_product(dtype: torch.dtype) -> float:
    """Seconds of a product of matrices as MLPs of small models have; the fastest of some, for other work disturbs."""
    left, right = torch.ones(512, 512, dtype=dtype), torch.ones(512, 512, dtype=dtype)

    def multiply() -> float:
        start = time.perf_counter()
        left @ right
        return time.perf_counter() - start

    return min(multiply() for _ in range(_TRIES))
