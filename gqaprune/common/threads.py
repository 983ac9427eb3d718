"""Set how OpenMP's threads wait for one another; its runtime reads the setting when torch is imported."""

import os

SETTINGS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
"""Environment variables for it: for all runtimes, for GNU's (torch's wheels for Linux), for LLVM's and Intel's."""


def let_threads_sleep() -> None:
    """Make waiting threads sleep instead of spin, unless the user has set how they wait; child processes inherit it.

    On a busy machine, a spinning thread can keep the thread that it waits for off its core; `benchmarks/contention.py`
    measures it. Must be called before torch is imported.
    """
    if not any(name in os.environ for name in SETTINGS):
        os.environ["OMP_WAIT_POLICY"] = "passive"
