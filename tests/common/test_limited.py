"""What others wrote ends at a limit of time and memory."""

import ctypes
import os
import signal
import sys
import time
from contextlib import suppress
from typing import Any

import pytest

from gqaprune.common import limited
from gqaprune.common.limited import _run_in_thread, run_limited


def run_on() -> None:
    while True:
        pass


def fill_memory() -> int:
    return len("a" * (10 << 30))


def recurse(depth: int = 0) -> int:
    return recurse(depth + 1)


def test_results_come_back_as_they_are() -> None:
    for result in (None, [], {"ids": [1, 2]}, "→ \udcff", 2.5, list(range(100_000))):
        assert run_limited(lambda result=result: result) == result  # type: ignore[misc]


@pytest.mark.parametrize(
    ("work", "sentence"),
    [
        (run_on, "it does not end within 1 s"),
        (lambda: time.sleep(60), "it does not end within 1 s"),
        (lambda: len(f"{1:1000000000000d}"), "it needs more than 2 GiB of memory"),
        (fill_memory, "it needs more than 2 GiB of memory"),
        (recurse, "maximum recursion depth exceeded"),
        (lambda: 1 // 0, ".*division.* by zero$"),
        (lambda: sys.exit("gone"), "gone"),
        (lambda: ctypes.string_at(0), "it needs more than 2 GiB of memory or breaks"),
        (lambda: os._exit(3), "it needs more than 2 GiB of memory or breaks"),
        (lambda: object(), "Object of type object is not JSON serializable"),
    ],
)
def test_what_goes_wrong_is_said_in_a_sentence(
    work: Any, sentence: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(limited, "_PATIENCE", 1.0)
    with pytest.raises(ValueError, match=f"^{sentence}"):
        run_limited(work, 1.0)
    assert capfd.readouterr() == ("", "")
    with suppress(ChildProcessError):  # other tests may have children that run
        assert os.waitpid(-1, os.WNOHANG) == (0, 0), "the child is left"


def test_the_child_leaves_the_parent_as_it_is(capfd: pytest.CaptureFixture[str]) -> None:
    handler, seen = signal.getsignal(signal.SIGTERM), []
    assert run_limited(lambda: seen.append(print("child"))) is None  # type: ignore[func-returns-value]
    assert not seen and signal.getsignal(signal.SIGTERM) is handler and capfd.readouterr() == ("", "")


def test_without_fork_time_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limited, "_PATIENCE", 1.0)
    assert _run_in_thread(lambda: [1], 60) == [1]
    with pytest.raises(ValueError, match="division.* by zero$"):
        _run_in_thread(lambda: 1 // 0, 60)
    with pytest.raises(ValueError, match="^it does not end within 0.1 s$"):
        _run_in_thread(lambda: time.sleep(1), 0.1)
