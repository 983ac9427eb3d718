"""The log of a run: what the console shows and other libraries say, each line with its time."""

import logging
import re
import sys
import threading
import warnings
from pathlib import Path

import pytest
from rich.console import Group
from rich.table import Table

from gqaprune.common.console import console, track
from gqaprune.common.run_log import LOG_FILE, RunLog

LINE = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} (INFO|WARNING|ERROR) +(.*)")


def read_log(folder: Path) -> list[tuple[str, str]]:
    """Level and text of every line, each of which has its time."""
    lines = (folder / LOG_FILE).read_text(encoding="utf-8").splitlines()
    found = [LINE.fullmatch(line) for line in lines]
    assert lines and all(found), lines
    return [(match[1], match[2]) for match in found if match]


def test_log_begins_with_command_and_versions_and_has_what_was_said_before_its_folder_was_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["/bin/gqaprune", "fit", "--model.pretrained", "my model"])
    with RunLog() as log:
        console.print("early [bold]words[/b]")
        log.open(tmp_path / "run")
        assert read_log(tmp_path / "run")[-1] == ("INFO", "early [bold]words[/b]")
        console.print("late", "words")
    texts = [text for _, text in read_log(tmp_path / "run")]
    assert texts[0] == "command: gqaprune fit --model.pretrained 'my model'"
    for name in ("torch", "lightning", "transformers", "gqaprune"):
        assert re.search(rf"\b{name} \d+\.\d+", texts[1])
    assert texts[2:] == ["early [bold]words[/b]", "late words"]


def test_log_has_tables_and_finished_progress_line_by_line(tmp_path: Path) -> None:
    table = Table(title="results")
    table.add_column("dense")
    table.add_row("12.34")
    with RunLog() as log:
        log.open(tmp_path)
        console.print(table)
        assert list(track(range(3), "scores", "batches")) == [0, 1, 2]
    texts = [text for _, text in read_log(tmp_path)]
    assert "│ 12.34 │" in texts and any("results" in text for text in texts)
    assert sum(bool(re.fullmatch(r"scores: 3 batches in \d+\.\d s", text)) for text in texts) == 1


def test_log_has_warnings_and_messages_of_other_libraries_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(logging.root, "handlers", [])
    silent = logging.getLogger("a.library.that.keeps.its.own")
    with warnings.catch_warnings(), RunLog() as log:
        warnings.simplefilter("always")
        silent.propagate = False  # made after the log began to listen
        log.open(tmp_path)
        warnings.warn("mind the gap", stacklevel=1)
        logging.getLogger("some.library").warning("it is\nlate")
        silent.warning("quiet please")
    heard = [text for level, text in read_log(tmp_path) if level == "WARNING"]
    assert re.fullmatch(r".*test_run_log\.py:\d+: UserWarning: mind the gap", heard[0])
    assert heard[1:] == ['warnings.warn("mind the gap", stacklevel=1)', "it is", "late", "quiet please"]
    shown = [line.strip() for line in capsys.readouterr().err.splitlines()]
    assert shown == heard[:-1]  # the last one's logger keeps it from the console


@pytest.mark.parametrize("is_terminal", [True, False])
def test_warnings_beside_a_progress_bar_are_shown_and_logged_once(
    is_terminal: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(console, "_force_terminal", is_terminal)
    monkeypatch.setattr(logging.root, "handlers", [])
    console.quiet = False
    long = "look [here] " * 30 + "and 3 there"
    with warnings.catch_warnings(), RunLog() as log:
        warnings.simplefilter("always")
        log.open(tmp_path)
        for _ in track(range(1), "work", "steps"):
            logging.getLogger("some.library").warning(long)
            warnings.warn("mind the gap", stacklevel=1)
            console.print("done")
    texts = [text for _, text in read_log(tmp_path)]
    out, err = capsys.readouterr()
    assert (err == "") == is_terminal  # where a bar is drawn they are shown above it
    shown = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", out + err).splitlines()
    for lines in (texts, shown):
        assert [lines.count(one) for one in (long, "done")] == [1, 1]
        assert sum("mind the gap" in line for line in lines) == 2  # and its line of code


def test_log_wraps_no_sentence_and_fits_other_things_into_its_width(tmp_path: Path) -> None:
    sentence = "word " * 50 + "end"
    with RunLog() as log:
        log.open(tmp_path)
        console.print(sentence)
        console.print(Group(sentence))
    texts = [text for _, text in read_log(tmp_path)]
    assert sentence in texts
    lines = texts[texts.index(sentence) + 1 :]
    assert len(lines) > 1 and "".join(lines).count("word") == 50


def test_log_has_no_line_and_no_control_that_a_name_made(tmp_path: Path) -> None:
    name = "a\n2026-01-01 00:00:00,000 ERROR   forged\r\x1b[2J"
    with RunLog() as log:
        log.open(tmp_path)
        console.print(f"saved in {name}")
        logging.getLogger("gqaprune").warning("%s", "beep\x07 and\x85 more")
    texts = [text for _, text in read_log(tmp_path)]
    assert texts[-2:] == [
        r"saved in a\n2026-01-01 00:00:00,000 ERROR   forged\r\x1b[2J",
        r"beep\x07 and\u0085 more",
    ]


def test_log_that_cannot_be_written_any_more_ends_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / LOG_FILE).symlink_to("/dev/full")
    with RunLog() as log:
        log.open(tmp_path)
        for number in range(3):
            console.print(f"line {number}")
    said = capsys.readouterr().err
    assert said.count("No space left on device") == 1 and f"{tmp_path / LOG_FILE}" in said
    assert "Traceback" not in said


def test_a_thread_that_ends_by_an_error_is_said_in_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise OSError(28, "No space left on device")

    before = threading.excepthook
    with RunLog() as log:
        log.open(tmp_path)
        thread = threading.Thread(target=fail, name="writer")
        thread.start()
        thread.join()
    assert read_log(tmp_path)[-1] == ("INFO", "writer stopped: [Errno 28] No space left on device")
    assert capsys.readouterr().err == "" and threading.excepthook is before


def test_log_has_the_trace_of_an_error_that_nobody_expected(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), RunLog() as log:
        log.open(tmp_path)
        print(1 / 0)
    errors = [text for level, text in read_log(tmp_path) if level == "ERROR"]
    assert errors[0] == "stopped by an error" and errors[-1] == "ZeroDivisionError: division by zero"


def test_later_runs_in_a_folder_append_and_nothing_is_heard_in_between(tmp_path: Path) -> None:
    show, handlers = warnings.showwarning, list(logging.root.handlers)
    for number in range(2):
        with RunLog() as log:
            log.open(tmp_path)
            console.print(f"run {number}")
        console.print("in between")
    texts = [text for _, text in read_log(tmp_path)]
    assert [text for text in texts if not text.startswith(("command", "versions"))] == ["run 0", "run 1"]
    assert warnings.showwarning is show and logging.root.handlers == handlers


def test_warnings_that_no_handler_hears_still_reach_the_console(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(logging.root, "handlers", [])
    own = logging.getLogger("a.library.with.a.handler")
    monkeypatch.setattr(own, "handlers", [logging.NullHandler()])
    with RunLog():
        logging.getLogger("some.library").warning("look here")
        own.warning("not here")
    assert capsys.readouterr().err.splitlines() == ["look here"]
    assert logging.root.handlers == []
