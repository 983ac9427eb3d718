"""Run code of others, such as a chat template, in a child process with limits of time and memory."""

import faulthandler
import json
import logging
import math
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from gqaprune.common.errors import first_line

SECONDS = 5.0
"""Limit of a child's CPU time; `_PATIENCE` times as much by the clock, because other programs may slow it down."""
MEMORY = 2 << 30
"""Limit of a child's memory in bytes, beyond its parent's memory."""
_PATIENCE = 10.0
_TOO_LARGE = f"it needs more than {MEMORY >> 30} GiB of memory"


def run_limited(work: Callable[[], Any], seconds: float | None = None) -> Any:
    """Run a function in a copy of this process, made in milliseconds, with limits of time and memory.

    The copy has only this thread: the function may compute, but must not use devices, files or other threads. Without
    `fork`, it runs in a thread that is abandoned after the time; macOS does not limit memory.

    Args:
        work: function that returns plain data, which is passed back as JSON.
        seconds: limit of its CPU time; `SECONDS` by default.

    Raises:
        ValueError: with its error in one line, or the limit that it exceeded.
    """
    seconds = SECONDS if seconds is None else seconds
    if sys.platform == "win32":
        return _run_in_thread(work, seconds)
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns about fork with other threads
        child = os.fork()
    if not child:
        _answer(work, seconds, writing)
    os.close(writing)
    try:
        with open(reading, "rb") as pipe:
            answer = pipe.read()
    finally:
        with suppress(ProcessLookupError):  # also after Ctrl-C
            os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
    try:
        result, error = json.loads(answer)
    except ValueError:
        is_late = os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGXCPU, signal.SIGALRM)
        raise ValueError(f"it does not end within {seconds:g} s" if is_late else f"{_TOO_LARGE} or breaks") from None
    if error is not None:
        raise ValueError(error)
    return result


def _answer(work: Callable[[], Any], seconds: float, writing: int) -> NoReturn:
    """Run the function in the child, write its result or error as JSON, and end without the parent's clean-up."""
    try:
        _limit(seconds)
        answer = json.dumps([work(), None])
    except MemoryError:
        answer = json.dumps([None, _TOO_LARGE])
    except BaseException as error:  # a panic in Rust is not an Exception
        answer = json.dumps([None, first_line(error)])
    with suppress(BaseException), open(writing, "w", encoding="ascii") as pipe:
        pipe.write(answer)
    os._exit(0)


def _limit(seconds: float) -> None:
    import resource

    for number in (signal.SIGALRM, signal.SIGXCPU, signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    faulthandler.disable()
    logging.disable()  # the parent reports the error
    warnings.simplefilter("ignore")
    sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    for output in (1, 2):
        os.dup2(sys.stdout.fileno(), output)
    limits = {resource.RLIMIT_CORE: 0, resource.RLIMIT_CPU: math.ceil(seconds)}
    with suppress(OSError):  # only Linux has this file
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
        limits[resource.RLIMIT_AS] = pages * resource.getpagesize() + MEMORY
    for name, value in limits.items():
        _, highest = resource.getrlimit(name)
        resource.setrlimit(name, (value if highest == resource.RLIM_INFINITY else min(value, highest), highest))
    signal.setitimer(signal.ITIMER_REAL, seconds * _PATIENCE)


def _run_in_thread(work: Callable[[], Any], seconds: float) -> Any:
    results: list[Any] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds * _PATIENCE)
    if errors:
        raise ValueError(first_line(errors[0]))
    if not results:
        raise ValueError(f"it does not end within {seconds * _PATIENCE:g} s")
    return results[0]
