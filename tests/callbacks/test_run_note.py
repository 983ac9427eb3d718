"""The note of a run, and its lock: held as long as the run goes on, however it ends."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gqaprune.common.atomic_files import remove_lock
from gqaprune.common.console import console
from gqaprune.module import CausalLMModule
from gqaprune.training.resume import UNFINISHED, RunNote, lock_note

from command import Run


def test_a_note_is_locked_for_one_run_at_a_time(tmp_path: Path) -> None:
    lock = lock_note(tmp_path)
    assert lock is not None and lock_note(tmp_path) is None
    RunNote({}, "logs", (), "name").save(tmp_path)
    RunNote.remove(tmp_path, lock)
    assert not (tmp_path / UNFINISHED).exists()
    again = lock_note(tmp_path)
    assert again is not None
    remove_lock(again)


def test_the_lock_of_a_killed_run_is_free(tmp_path: Path) -> None:
    lines = (
        "import sys, time, filelock\n"
        "lock = filelock.FileLock(sys.argv[1])\n"
        "lock.acquire()\n"
        "print(flush=True)\n"
        "time.sleep(99)\n"
    )
    path = tmp_path / UNFINISHED / "run.lock"
    path.parent.mkdir(parents=True)
    with subprocess.Popen([sys.executable, "-c", lines, str(path)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline()
        assert lock_note(tmp_path) is None
        process.kill()
    lock = lock_note(tmp_path)
    assert lock is not None
    remove_lock(lock)


def test_a_run_that_fails_leaves_its_note_to_the_next_one_in_the_same_process(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[bool] = []

    def fail(*_: Any) -> None:
        seen.append(lock_note(Path()) is None)
        raise ValueError("out of luck")

    with monkeypatch.context() as broken:
        broken.setattr(CausalLMModule, "training_step", fail)
        assert run("fit") == 1
    assert seen == [True]
    assert (UNFINISHED / "run.json").exists() and not (UNFINISHED / "run.lock").exists()
    console.quiet = False
    assert run("fit") == 0
    assert "resuming the run in lightning_logs/version_0, which has no checkpoint" in capsys.readouterr().out
    assert not UNFINISHED.exists()
