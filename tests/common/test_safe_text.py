"""Hostile names stay data wherever they are shown."""

import ast
import subprocess
from pathlib import Path

import pytest

from gqaprune.common.safe_text import for_log, for_markdown, for_python, for_shell, for_terminal

HOSTILE = (
    "\x1b[2J\x1b[31mred",
    "\x1b]52;c;ZXZpbA==\x07",
    "\x1b]8;;http://x\x1b\\link\x1b]8;;\x1b\\",
    "\x9b31m\x85\x90",
    "good\rbad",
    "ab\b\b\x7f",
    "\u202egnp.exe\u2066",
    "\u2028line\u2029",
    "\udcff half",
    "\ufeff\U000e0041tag",
    "a\n2026-01-01 00:00:00,000 ERROR   forged",
    "quote\" ' `tick` \\ end\\",
    "$(touch evil) ; `id` && x",
    "[link](http://x) <script>*b* | cell",
)


@pytest.mark.parametrize("text", HOSTILE)
def test_nothing_that_steers_a_terminal_or_ends_a_line_is_left(text: str) -> None:
    for shown in (for_log(text), for_markdown(text), for_python(text), for_shell(text)):
        assert shown.isprintable()
    assert for_terminal(text).replace("\n", "").isprintable()


def test_plain_text_of_any_language_stays_as_it_is() -> None:
    for text in ("smollm2-135m", "Größe → ✅", "می\u200cخواهم", "👩\u200d💻", "模型\u3000甲", "a\u00a0b"):
        assert for_log(text) == for_terminal(text) == text
    assert for_terminal("a\r\n\tb\n") == "a\n\tb\n"


@pytest.mark.parametrize("text", HOSTILE)
def test_python_reads_the_same_text(text: str) -> None:
    assert ast.literal_eval(for_python(text)) == text


@pytest.mark.parametrize("text", ["", "plain", *HOSTILE])
def test_bash_reads_the_same_word_and_runs_nothing_of_it(text: str, tmp_path: Path) -> None:
    command = f"printf '%s\\0' {for_shell(text)} {for_shell('next')}"
    run = subprocess.run(
        ["bash", "-c", command], cwd=tmp_path, env={"LC_ALL": "C.UTF-8"}, check=True, capture_output=True
    )
    assert run.stdout.decode("utf-8", "surrogateescape") == f"{text}\0next\0"
    assert not list(tmp_path.iterdir())


def test_markdown_has_no_markup_of_the_text_left() -> None:
    shown = for_markdown("![a](http://b) <i> *c* `d` | www.e.f #1 @g: h")
    assert shown == r"!\[a\](http\://b) \<i\> \*c\* \`d\` \| www\.e.f \#1 \@g: h"
