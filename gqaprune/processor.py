"""Keeps torch off instructions that a processor announces and does not run, at which the process would be killed.

And says what is left: whether products in bfloat16 are worth it.
"""

import faulthandler
import os
import signal
from collections.abc import Callable

import torch

SETTING = "ONEDNN_MAX_CPU_ISA"
"""Environment variable that oneDNN, torch's library of products on CPUs, reads before its first one."""


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


def has_matrix_tiles() -> bool:
    """Whether products of bfloat16 matrices run on tiles: the processor announces them, and oneDNN may use them.

    Without them float32 is faster: 117 GFLOP/s against 57 to 77 on the processor that this was measured on.
    """
    allowed = os.environ.get(SETTING) or "ALL"
    return bool(torch.cpu.get_capabilities().get("amx_bf16")) and (
        "AMX" in allowed.upper() or allowed.upper() in ("ALL", "DEFAULT")
    )
