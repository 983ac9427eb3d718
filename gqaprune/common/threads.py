"""How OpenMP's threads wait for one another, which its runtime reads as it is loaded, with torch."""

import os

SETTINGS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
"""Environment variables that say it: of every runtime, of GNU's (torch's wheels for Linux), of LLVM's and Intel's."""


def let_threads_sleep() -> None:
    """Make waiting threads sleep instead of spin, unless the user has said how they wait; child processes inherit it.

    A spinning thread may keep the one that it waits for off a core that other work shares; `benchmarks/contention.py`
    measures it. Has to come before torch is imported.
    """
    if not any(name in os.environ for name in SETTINGS):
        os.environ["OMP_WAIT_POLICY"] = "passive"
