"""Files and folders take another's place in one step, whatever happens on the way."""

import gc
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from gqaprune.common import atomic_files
from gqaprune.common.atomic_files import (
    ScratchFolder,
    check_can_be_folder,
    remove_leftovers,
    replace_folder,
    reserve_name,
    write_atomically,
)

SCRIPT = f"""
import runpy, sys, time, types
from pathlib import Path
package = sys.modules["gqaprune"] = types.ModuleType("gqaprune")
package.__path__ = [{str(Path(atomic_files.__file__).parents[1])!r}]
globals().update(runpy.run_path({atomic_files.__file__!r}))  # without the package, whose import takes long
root = Path(sys.argv[1])
"""


@pytest.fixture
def kill_at(tmp_path: Path) -> Callable[[str], None]:
    """Run lines of Python with `root`, a folder, in a process that is killed once it has printed a line."""

    def run(lines: str, wait: float = 0.0) -> None:
        process = subprocess.Popen([sys.executable, "-c", SCRIPT + lines, str(tmp_path)], stdout=subprocess.PIPE)
        assert process.stdout is not None and process.stdout.readline()
        time.sleep(wait)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()

    return run


def fill(folder: Path, content: str) -> None:
    with replace_folder(folder) as new:
        (new / "file").write_text(content)


def read_names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("exchanges", [True, False], ids=["one step", "two renames"])
def test_the_new_folder_takes_the_name_and_nothing_else_is_left(
    tmp_path: Path, exchanges: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not exchanges:
        monkeypatch.setattr(atomic_files, "_exchange", lambda *_: False)
        (tmp_path / ".out.old").mkdir()  # left by a program that was killed between both renames
        (tmp_path / ".out.old/file").touch()
    (tmp_path / ".out.gqaprune.tmp").mkdir()
    (tmp_path / ".out.gqaprune.tmp/half").touch()  # left by one that was killed before them
    for content in ("first", "second"):
        fill(tmp_path / "out", content)
        assert (tmp_path / "out/file").read_text() == content
        assert read_names(tmp_path) == {"out"} and read_names(tmp_path / "out") == {"file"}


def test_an_error_leaves_the_old_folder_and_nothing_beside_it(tmp_path: Path) -> None:
    fill(tmp_path / "out", "old")
    with pytest.raises(KeyboardInterrupt), replace_folder(tmp_path / "out") as new:
        (new / "file").write_text("half")
        raise KeyboardInterrupt
    assert (tmp_path / "out/file").read_text() == "old" and read_names(tmp_path) == {"out"}


def test_a_rename_that_fails_puts_the_older_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(atomic_files, "_exchange", lambda *_: False)
    fill(tmp_path / "out", "old")
    rename = os.replace

    def fail_for_new(source: Path, target: Path) -> None:
        if source == tmp_path / ".out.gqaprune.tmp":
            raise OSError("disk on fire")
        rename(source, target)

    monkeypatch.setattr(os, "replace", fail_for_new)
    with pytest.raises(OSError, match="disk on fire"):
        fill(tmp_path / "out", "new")
    assert (tmp_path / "out/file").read_text() == "old" and read_names(tmp_path) == {"out"}


def test_a_killed_program_leaves_the_old_folder_or_the_new_one(tmp_path: Path, kill_at: Callable[..., None]) -> None:
    fill(tmp_path / "out", "0")
    lines = (
        "for index in range(10**9):\n"
        "    with replace_folder(root / 'out') as new:\n"
        "        (new / 'file').write_text(str(index))\n"
        "    print(index, flush=True)\n"
    )
    for wait in (0.01, 0.02, 0.05):
        kill_at(lines, wait)
        assert (tmp_path / "out/file").read_text().isdigit()
    fill(tmp_path / "out", "after")
    assert read_names(tmp_path) == {"out"}


def test_a_folder_is_written_by_one_process_after_the_other(tmp_path: Path) -> None:
    lines = "with replace_folder(root / 'out') as new: (new / 'file').write_text('other')"
    with replace_folder(tmp_path / "out") as new:
        (new / "file").write_text("this")
        other = subprocess.Popen([sys.executable, "-c", SCRIPT + lines, str(tmp_path)])
        with pytest.raises(subprocess.TimeoutExpired):
            other.wait(1.5)
        assert read_names(new) == {"file"}
    assert other.wait() == 0
    assert (tmp_path / "out/file").read_text() == "other" and read_names(tmp_path) == {"out"}


def test_failed_save_keeps_the_old_file_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    path.write_text("old")
    with pytest.raises(TypeError):
        write_atomically(path, "text where bytes belong")  # type: ignore[arg-type]  # fails once the file is open
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_takes_over_what_a_killed_write_of_the_same_name_left(
    tmp_path: Path, kill_at: Callable[..., None]
) -> None:
    kill_at("with reserve_name(root / '[x].json') as new: new.write_text('half'); print(flush=True); time.sleep(99)")
    (tmp_path / ".y.json.gqaprune.tmp").touch()
    assert read_names(tmp_path) == {".[x].json.gqaprune.tmp", ".[x].json.gqaprune.lock", ".y.json.gqaprune.tmp"}
    write_atomically(tmp_path / "[x].json", b"whole")
    assert read_names(tmp_path) == {"[x].json", ".y.json.gqaprune.tmp"}
    assert (tmp_path / "[x].json").read_bytes() == b"whole"


def test_processes_that_write_the_same_file_end_with_one_whole_file(tmp_path: Path) -> None:
    lines = "for _ in range(30): write_atomically(root / 'file', sys.argv[2].encode() * 100_000)"
    writers = [subprocess.Popen([sys.executable, "-c", SCRIPT + lines, str(tmp_path), letter]) for letter in "abc"]
    assert [writer.wait() for writer in writers] == [0, 0, 0]
    content = (tmp_path / "file").read_bytes()
    assert len(content) == 100_000 and len(set(content)) == 1 and read_names(tmp_path) == {"file"}


def test_a_scratch_folder_is_new_and_goes_with_its_object(tmp_path: Path) -> None:
    first, second = ScratchFolder(tmp_path / "work"), ScratchFolder(tmp_path / "work")
    assert first.path != second.path and set(tmp_path.iterdir()) == {first.path, second.path}
    (second.path / "file").touch()
    del second
    gc.collect()
    assert set(tmp_path.iterdir()) == {first.path}


def test_scratch_folders_of_killed_programs_are_removed_and_those_of_others_are_not(
    tmp_path: Path, kill_at: Callable[..., None]
) -> None:
    kill_at("x = ScratchFolder(root / 'work'); (x.path / 'file').touch(); print(flush=True); time.sleep(99)")
    kill_at("x = ScratchFolder(root / 'other'); print(flush=True); time.sleep(99)")
    lines = "x = ScratchFolder(root / 'work'); print(x.path, flush=True); input()"
    command = [sys.executable, "-c", SCRIPT + lines, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None
        theirs = Path(running.stdout.readline().strip())
        mine = ScratchFolder(tmp_path / "work")
        assert set(tmp_path.glob(".work.*")) == {theirs, mine.path}
        assert len(list(tmp_path.glob(".other.*"))) == 1
        running.communicate("\n")
    assert set(tmp_path.glob(".work.*")) == {mine.path}


def test_leftovers_of_killed_programs_are_removed_and_what_a_running_one_writes_is_not(
    tmp_path: Path, kill_at: Callable[..., None]
) -> None:
    kill_at(
        "y = replace_folder(root / 'out'); x = y.__enter__(); (x / 'file').touch(); print(flush=True); time.sleep(99)"
    )
    kill_at("x = ScratchFolder(root / 'work'); print(flush=True); time.sleep(99)")
    for theirs in (".notes.tmp", ".notes.lock", ".my.scratch"):
        (tmp_path / theirs).mkdir()
    with reserve_name(tmp_path / "running") as temporary:
        temporary.touch()
        assert len(read_names(tmp_path)) == 8
        remove_leftovers(tmp_path, tmp_path / "gone")
        own = {".running.gqaprune.tmp", ".running.gqaprune.lock"}
        assert read_names(tmp_path) == {".notes.tmp", ".notes.lock", ".my.scratch", *own}


def test_a_folder_that_cannot_be_written_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in ("file", "file/below", "x" * 300, f"a/{'x' * 300}/b", "x" * 250):
        with pytest.raises(ValueError, match="cannot write to .*; choose another folder"):
            check_can_be_folder(tmp_path / path)
    check_can_be_folder(tmp_path / "a/b/c")
    check_can_be_folder(tmp_path)
    assert read_names(tmp_path) == {"file"}
