"""A process is known by its place and its start, not by its number alone."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from gqaprune.common import processes
from gqaprune.common.processes import is_gone, is_running, name_process


def test_this_process_runs_and_one_that_ended_is_gone() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    name = name_process(child.pid)
    assert is_running(name) and is_running(name_process()) and not is_gone(name)
    child.communicate(b"\n")
    assert is_gone(name) and not is_running(name)
    assert name != name_process() and "." not in name


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="the start of a process is read from /proc")
def test_another_process_of_the_same_number_is_not_the_one_that_had_it() -> None:
    place, number, start = name_process().split("-")
    assert is_gone(f"{place}-{number}-{start}0")


def test_of_another_machine_or_container_nothing_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    name = name_process()
    monkeypatch.setattr("socket.gethostname", lambda: "another")
    assert not is_running(name) and not is_gone(name)


def test_numbers_alone_do_where_there_is_no_proc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "_PROC", tmp_path)
    assert is_running(name_process()) and name_process().endswith(f"-{os.getpid()}-")


@pytest.mark.parametrize("name", ["", "1", "a-b-c", "half written"])
def test_what_names_no_process_is_not_running(name: str) -> None:
    assert not is_running(name) and not is_gone(name)
