"""A folder takes another's place in one step, whatever happens on the way."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gqaprune.common import atomic_files as replace
from gqaprune.common.atomic_files import make_temporary_folder, replace_folder, write_atomically
from gqaprune.common.processes import name_process


def name_ended_process() -> str:
    ended = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    name = name_process(ended.pid)
    ended.communicate(b"\n")
    return name


PARENT = name_process(os.getppid())


def make_folder(path: Path, content: str) -> Path:
    path.mkdir()
    (path / "file").write_text(content)
    return path


@pytest.mark.parametrize("exchanges", [True, False], ids=["one step", "two renames"])
def test_the_new_folder_takes_the_name_and_nothing_else_is_left(
    tmp_path: Path, exchanges: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not exchanges:
        monkeypatch.setattr(replace, "_exchange", lambda *_: False)
    for content in ("first", "second"):
        replace_folder(make_folder(tmp_path / ".out.1.tmp", content), tmp_path / "out")
        assert (tmp_path / "out/file").read_text() == content
        assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_rename_that_fails_puts_the_older_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replace, "_exchange", lambda *_: False)
    folder, new = make_folder(tmp_path / "out", "old"), make_folder(tmp_path / ".out.1.tmp", "new")
    rename = Path.rename

    def fail_for_new(path: Path, target: Path) -> Path:
        if path == new:
            raise OSError("disk on fire")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail_for_new)
    with pytest.raises(OSError, match="disk on fire"):
        replace_folder(new, folder)
    assert (folder / "file").read_text() == "old"


def test_what_killed_programs_left_is_removed_and_what_others_write_is_not(tmp_path: Path) -> None:
    ended = name_ended_process()
    for process in (ended, PARENT):
        make_folder(tmp_path / f".out.{process}.tmp", "half")
    replace_folder(make_folder(tmp_path / f".out.{name_process()}.tmp", "whole"), tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"out", f".out.{PARENT}.tmp"}


def test_a_killed_program_leaves_the_old_folder_or_the_new_one(tmp_path: Path) -> None:
    make_folder(tmp_path / "out", "start")
    script = (
        "import sys; from pathlib import Path; from gqaprune.common.atomic_files import replace_folder\n"
        "root = Path(sys.argv[1])\n"
        "for index in range(10**9):\n"
        "    new = root / f'.out.{index}.tmp'; new.mkdir(); (new / 'file').write_text(str(index))\n"
        "    replace_folder(new, root / 'out')\n"
        "    print(index, flush=True)\n"
    )
    for wait in (0.01, 0.02, 0.05):
        process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE)
        assert process.stdout is not None and process.stdout.readline()
        time.sleep(wait)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        assert (tmp_path / "out/file").read_text().isdigit()


def test_failed_save_keeps_the_old_file_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    path.write_text("old")
    with pytest.raises(TypeError):
        write_atomically(path, "text where bytes belong")  # type: ignore[arg-type]  # fails once the file is open
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_removes_what_killed_writes_of_the_same_name_left(tmp_path: Path) -> None:
    ended = name_ended_process()
    others = [f".[x].json.{PARENT}.tmp", f".y.json.{ended}.tmp"]
    for name in (f".[x].json.{ended}.tmp", *others):
        (tmp_path / name).write_text("half")
    write_atomically(tmp_path / "[x].json", b"whole")
    assert {path.name for path in tmp_path.iterdir()} == {"[x].json", *others}


def test_a_temporary_folder_is_new_and_those_of_killed_programs_go(tmp_path: Path) -> None:
    ended = name_ended_process()
    make_folder(tmp_path / f".work.x.{ended}.tmp", "half")
    make_folder(tmp_path / f".work.x.{PARENT}.tmp", "half")
    first, second = make_temporary_folder(tmp_path / "work"), make_temporary_folder(tmp_path / "work")
    assert first != second
    assert set(tmp_path.iterdir()) == {first, second, tmp_path / f".work.x.{PARENT}.tmp"}
