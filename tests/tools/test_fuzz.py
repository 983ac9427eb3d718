"""The fuzzers see what they are for: a traceback, a run without an end, too much memory, another result."""

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

FUZZ = Path(__file__).parent.parent / "fuzz"
if str(FUZZ) not in sys.path:
    sys.path.insert(0, str(FUZZ))

from isolated import run_isolated
from judging import judge


def say(sentence: str, code: int) -> int:
    print(sentence, file=sys.stderr)
    return code


def raise_an_error() -> int:
    raise KeyError("x")


CASES: dict[str, tuple[Callable[[], int], str | None]] = {
    "ends well": (lambda: 0, None),
    "one sentence": (lambda: say("gqaprune: error: there is something wrong with it", 1), None),
    "no sentence": (lambda: 1, "exit code 1 with 0 sentences"),
    "a traceback": (raise_an_error, "a traceback: KeyError"),
    "a signal": (lambda: os.kill(os.getpid(), 11) or 0, "killed by signal 11"),
    "no end": (lambda: time.sleep(60) or 0, "still running"),
    "too much memory": (lambda: len(bytearray(2**33)) and 0, "a traceback: MemoryError"),
    "an escape": (lambda: say("\x1b[31mred", 0), "control characters"),
}


@pytest.mark.parametrize("name", CASES)
def test_what_is_wrong_with_a_case_is_seen(name: str, tmp_path: Path) -> None:
    work, expected = CASES[name]
    is_slow = name == "no end"
    wrong = judge(run_isolated(work, tmp_path, seconds=1 if is_slow else 60, memory=2**30))
    assert wrong is None if expected is None else (wrong or "").startswith(expected), wrong
