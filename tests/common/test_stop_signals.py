"""Signals that set a flag or end the process: each in a process of its own."""

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from gqaprune.common.stop_signals import STOPS, Stopped, StopSignals

DEFAULTS = dict.fromkeys(STOPS, signal.SIG_DFL) | {signal.SIGINT: signal.default_int_handler}


def run(work: Callable[[Path], None], folder: Path, *numbers: int, pause: float = 0.0) -> int:
    """Run a function, and send signals once it has made the file `ready`; returns the exit code."""

    def begin() -> None:
        for number, handler in DEFAULTS.items():  # whatever other tests have left
            signal.signal(number, handler)
        work(folder)

    process = multiprocessing.get_context("fork").Process(target=begin)
    process.start()
    while not (folder / "ready").exists():
        time.sleep(0.01)
    assert process.pid is not None
    for number in numbers:
        os.kill(process.pid, number)
        time.sleep(pause)
    process.join()
    assert process.exitcode is not None
    return process.exitcode


def step(folder: Path) -> None:
    """Work that looks at the flag at its end."""
    signals = StopSignals()
    signals.install()
    signals.defer()
    (folder / "ready").touch()
    while not signals.number:
        time.sleep(0.01)
    (folder / "finished").touch()
    signals.stop_at_once()


def step_for_ever(folder: Path) -> None:
    """Work that does not."""
    signals = StopSignals()
    signals.install()
    signals.defer()
    (folder / "ready").touch()
    time.sleep(600)


def clean_up(folder: Path) -> None:
    """Work that may stop at any time."""
    signals = StopSignals()
    signals.install()
    try:
        (folder / "ready").touch()
        time.sleep(600)
    finally:
        (folder / "cleaned").touch()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP])
def test_a_deferred_signal_lets_a_step_end_first(number: int, tmp_path: Path) -> None:
    assert run(step, tmp_path, number) == 128 + number
    assert (tmp_path / "finished").exists()


def test_a_signal_at_any_other_time_leaves_room_to_clean_up(tmp_path: Path) -> None:
    assert run(clean_up, tmp_path, signal.SIGTERM) == 128 + signal.SIGTERM
    assert (tmp_path / "cleaned").exists()


def test_a_second_signal_ends_the_process_at_once(tmp_path: Path) -> None:
    assert run(step_for_ever, tmp_path, signal.SIGTERM, signal.SIGINT, pause=1.5) == 128 + signal.SIGTERM


def test_signals_that_others_ignore_or_handle_are_left_alone() -> None:
    signals = StopSignals()
    before = signal.signal(signal.SIGUSR1, signal.SIG_IGN), signal.signal(signal.SIGUSR2, print)
    try:
        signals.install()
        assert signal.getsignal(signal.SIGUSR1) == signal.SIG_IGN and signal.getsignal(signal.SIGUSR2) is print
        assert signals.is_installed
    finally:
        signals.restore()
        signal.signal(signal.SIGUSR1, before[0])
        signal.signal(signal.SIGUSR2, before[1])
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_an_error_of_another_thread_is_raised_in_the_main_one() -> None:
    signals = StopSignals()
    signals.install()
    try:
        with pytest.raises(KeyError, match="news"):
            signals.interrupt(KeyError("news"))
            time.sleep(60)
        assert signals.number == 0
    finally:
        signals.restore()


def test_stopped_is_an_exit_with_the_code_of_its_signal() -> None:
    assert Stopped(signal.SIGTERM).code == 143
