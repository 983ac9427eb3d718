"""The console shows everything as it is, and never ends the work."""

import io
import os
import re
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path

import pytest
from rich.table import Table
from rich.text import Text

from gqaprune.common.console import SafeConsole, SafeStream, console, keep_streams_safe, track

MARKUP = "out[/b] out[v2] [link=http://x]l[/link] :smile: [red]r"
HOSTILE = "a\x1b[2Jb\x1b]52;c;ZXZpbA==\x07c\x9b31md\re\x08f\u202eg"
SHOWN = r"a\x1b[2Jb\x1b]52;c;ZXZpbA==\x07c\u009b31md\re\x08f\u202eg"


def show(*objects: object) -> str:
    """What a console of a terminal writes."""
    file = io.StringIO()
    SafeConsole(file=file, force_terminal=True, color_system="standard", width=500).print(*objects)
    return file.getvalue()


def test_markup_and_emoji_codes_are_text() -> None:
    assert show(MARKUP) == f"{MARKUP}\n"
    table = Table(MARKUP, title=MARKUP, caption=MARKUP)
    table.add_row(MARKUP)
    assert show(table).count(MARKUP) == 4


def test_nothing_steers_the_terminal_wherever_it_stands() -> None:
    assert show(HOSTILE) == f"{SHOWN}\n"
    table = Table(HOSTILE, title=HOSTILE, caption=HOSTILE)
    table.add_row(HOSTILE)
    shown = show(table, Text(HOSTILE))
    assert shown.count(SHOWN) == 4 and re.sub(r"\\(r|x0[78])", "", SHOWN) in shown  # rich's texts have no such codes
    assert not {"\x07", "\x9b", "\r", "\x08", "\u202e"} & set(shown)
    assert "\x1b]" not in shown and "\x1b[2J" not in shown


def test_a_string_is_one_line_and_a_text_keeps_its_own() -> None:
    assert show("a\nb") == "a\\nb\n"
    assert show(Text("a\r\nb\tc")).split() == ["a", "b", "c"]


def test_styles_are_asked_for_by_text() -> None:
    assert show(Text("risk:", "red"), "[x]") == "\x1b[31mrisk:\x1b[0m [x]\n"


def test_a_progress_bar_takes_any_description(capsys: pytest.CaptureFixture[str]) -> None:
    console.quiet = False
    assert list(track([1, 2], f"the model {MARKUP}\x1b[2J", "steps")) == [1, 2]
    assert "out[/b]" in capsys.readouterr().out


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "cp437", "utf-8"])
def test_signs_that_an_encoding_lacks_are_spelled_out(encoding: str) -> None:
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding=encoding)
    table = Table("loss → ppl", title="✅ 日本")
    table.add_row("–")
    with redirect_stdout(file):
        one = SafeConsole(soft_wrap=True)
        one.print("12 → 9 ✅ 日本 é", table)
        list(track([1], "→", "steps"))
    file.flush()
    shown = raw.getvalue().decode(encoding)
    assert "日本" in shown if encoding == "utf-8" else "12 -> 9 + \\u65e5\\u672c" in shown


class _Broken(io.StringIO):
    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.broken_by = error

    def write(self, text: str) -> int:
        raise self.broken_by

    flush = write  # type: ignore[assignment]


@pytest.mark.parametrize("error", [BrokenPipeError(), OSError(28, "No space left on device"), ValueError("closed")])
def test_a_stream_that_is_gone_ends_nothing(error: Exception) -> None:
    stream = SafeStream(_Broken(error))
    SafeConsole(file=stream).print("still there")
    assert stream.error is (error if type(error) is OSError else None)
    SafeConsole(file=_Broken(error)).print("still there")


def test_what_cannot_be_rendered_is_left_out() -> None:
    class Odd:
        def __rich__(self) -> str:
            raise ZeroDivisionError

    assert show(Odd()) == ""
    assert show("next") == "next\n"


@pytest.mark.parametrize("columns", ["0", "1", "999999", "-1", "x"])
def test_any_width_of_the_terminal_will_do(columns: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    table = Table("a", "b", title="title")
    table.add_row("one", "two")
    file = io.StringIO()
    SafeConsole(file=file, force_terminal=True).print(table)
    SafeConsole(file=file, soft_wrap=True).print("a sentence")
    assert "sentence" in file.getvalue()


PROGRAM = """
import os, sys
from gqaprune.common.console import SafeConsole, keep_streams_safe

def close(*numbers):
    for number in numbers:
        os.close(number)
        setattr(sys, ("stdin", "stdout", "stderr")[number], None)

def cut():
    reading, writing = os.pipe()
    os.close(reading)
    os.dup2(writing, 1)

consoles = {
    "gone": cut,
    "full": lambda: os.dup2(os.open("/dev/full", os.O_WRONLY), 1),
    "no output": lambda: close(1),
    "no errors": lambda: close(2),
    "nothing": lambda: close(0, 1, 2),
}
for name, prepare in consoles.items():
    if os.fork():
        code = os.waitstatus_to_exitcode(os.wait()[1])
        open(name, "a").write(f" {code}")
        continue
    prepare()
    with keep_streams_safe() as output:
        for _ in range(200):
            SafeConsole().print("→ ✅ a line of some length, many times")
            print("→ ✅ as others print it")
    open(name, "w").write(f"{output.error}")
    break
"""


def test_a_program_whose_console_is_gone_ends_well(tmp_path: Path) -> None:
    paths = {"PYTHONPATH": os.pathsep.join(sys.path), "PYTHONIOENCODING": "ascii", "TERM": "dumb"}
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=tmp_path, env=os.environ | paths, capture_output=True, timeout=300
    )
    assert run.returncode == 0 and run.stderr == b""
    written = {path.name: path.read_text() for path in tmp_path.iterdir()}
    full = "[Errno 28] No space left on device 0"
    assert written == dict.fromkeys(("gone", "no output", "no errors", "nothing"), "None 0") | {"full": full}


def test_streams_are_put_back() -> None:
    before = sys.stdout, sys.stderr
    with keep_streams_safe() as output:
        assert sys.stdout is output  # type: ignore[comparison-overlap]
    assert (sys.stdout, sys.stderr) == before
