"""Names and texts of any kind go through whole runs as data: shown as they are, run by nothing, ending nothing."""

import json
import os
import re
import shutil
import sys
from pathlib import Path

import pytest

from gqaprune.cli import main
from gqaprune.common.console import console

from command import Run

NAME = "a[/b] [v2] :smile: \x1b[2J\x1b]52;c;ZQ==\x07\u202e\x9b'\"`$(id)<b>|{x}%s\nERROR forged\r"
SHOWN = NAME.encode("unicode_escape").decode().replace("\\x9b", "\\u009b")


def check_plain(text: str) -> None:
    """Nothing in it steers a terminal."""
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", text)


def check_console(text: str) -> None:
    """And no name has made a line."""
    check_plain(text)
    assert not re.search(r"^ERROR forged", text, re.MULTILINE)


@pytest.fixture
def hostile_folder(tiny_folder: Path, tmp_path: Path) -> Path:
    """A model in a folder of a hostile name."""
    folder = tmp_path / NAME
    shutil.copytree(tiny_folder, folder)
    return folder


def test_a_run_of_hostile_names_ends_well_and_shows_them_as_they_are(
    run: Run, hostile_folder: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    console.quiet = False
    corpus = Path(f"text {NAME}.txt")
    corpus.parent.mkdir()
    corpus.write_text("Once upon a time there was a model. " * 200)
    settings = json.dumps([str(corpus)])
    names = ["--model.pretrained", str(hostile_folder), "--trainer.default_root_dir", f"root {NAME}"]
    names += ["--data.prompts", json.dumps([NAME, "[/b]"]), "--data.evaluation.val", settings]
    assert run("fit", *names, "--export.folder", f"out {NAME}") == 0
    out, err = capfd.readouterr()
    check_console(out + err)
    assert f"out {SHOWN}  per-layer format" in out
    (folder,) = Path(f"root {NAME}").glob("lightning_logs/version_0")
    log = (folder / "run.log").read_text(encoding="utf-8")
    check_console(log)
    assert all(re.match(r"\d{4}-\d\d-\d\d ", line) for line in log.splitlines())
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "<b>|" not in page and "&lt;b&gt;|" in page and not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", page)
    check_console((Path(f"out {NAME}") / "README.md").read_text(encoding="utf-8"))

    for command in (
        ["inspect", f"out {NAME}"],
        ["export", "--model", f"out {NAME}", "--folder", f"padded {NAME}", "--format", "padded"],
        ["compare", str(hostile_folder), f"out {NAME}", "--corpora", "[]", "--speed", "false"],
        ["inspect", f"no {NAME}"],
    ):
        monkeypatch.setattr(sys, "argv", ["gqaprune", *command])
        assert main() == command[1].startswith("no")
        out, err = capfd.readouterr()
        check_console(out + err)
        assert "".join(SHOWN.split()) in "".join(out.split()) or ":smile:" in err  # lines of tables are wrapped


def test_predictions_of_hostile_texts_reach_no_terminal_raw(
    run: Run, hostile_folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    console.quiet = False
    assert run("predict", "--model.pretrained", str(hostile_folder), "--data.prompts", json.dumps([NAME])) == 0
    out, err = capfd.readouterr()
    check_plain(out + err)  # a text has lines of its own
    assert "[/b] [v2] :smile:" in out


def test_a_folder_whose_name_no_file_can_be_written_by_is_refused_before_work(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("prune", "--export.folder", os.fsdecode(b"out\xff")) == 1
    assert "cannot write to out\\udcff: its name is not valid UTF-8" in capsys.readouterr().err
