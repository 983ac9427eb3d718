"""Run something in a process of its own, with limits on time and memory: what it printed, and how it ended."""

import os
import resource
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Args:
        code: its exit code; negative for the signal that killed it; null where it was out of time.
        output: what it wrote to standard output and error, the traceback included where it raised.
        seconds: that it took of its own processor time, or of the clock where it waited.
    """

    code: int | None
    output: str
    seconds: float


def run_isolated(work: Callable[[], int], folder: Path, seconds: float, memory: int) -> Outcome:
    """Run in a fork of this process.

    Args:
        work: what to run; returns the exit code.
        folder: to run it in.
        seconds: of the clock that it may take.
        memory: bytes that it may take beyond what this process has.
    """
    reading, writing = os.pipe()
    start = time.monotonic()
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        _work(work, folder, writing, memory)
    os.close(writing)
    output, is_late = b"", False
    while not is_late:
        is_late = not select.select([reading], [], [], max(0.0, start + seconds - time.monotonic()))[0]
        if not is_late:
            if not (piece := os.read(reading, 1 << 16)):
                break
            output = (output + piece)[-1_000_000:]
    os.close(reading)
    if is_late:
        os.killpg(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    code = None if is_late else os.waitstatus_to_exitcode(status)
    return Outcome(code, output.decode(errors="replace"), time.monotonic() - start)


def _work(work: Callable[[], int], folder: Path, writing: int, memory: int) -> None:
    code = 70
    try:
        os.setpgid(0, 0)
        for number in (1, 2):
            os.dup2(writing, number)
        os.close(writing)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + memory, used + memory))
        os.chdir(folder)
        code = work()
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
