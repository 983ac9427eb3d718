"""Names and texts that others wrote are data: one function for each place that they are shown in.

A folder, a prompt, what a model writes, a setting in someone's `plan.json` or another library's error may hold
anything: sequences that rewrite a terminal, characters that turn a line's direction, markup, quotes, line breaks.
"""

import re
import shlex
import unicodedata

_INVISIBLE = ("Cc", "Cf", "Cs", "Zl", "Zp")
"""Unicode categories without a shape of their own: controls, formats, halves of characters, separators."""
_JOINERS = "\u200c\u200d"
"""Formats that words of some languages, and emojis, are written with."""
_MARKDOWN = re.compile(r"[\\`*_\[\]<>|&~#$@]|:(?=//)|(?<=www)\.", re.IGNORECASE)
"""What Markdown gives a meaning in the middle of a line; addresses become links by themselves."""


def for_terminal(text: str) -> str:
    """Show a text on a terminal as it is, line breaks and tabs included, and what would steer the terminal by its code.

    Args:
        text: of any origin. Windows' line breaks become plain ones.
    """
    return _escape(text.replace("\r\n", "\n"), "\n\t")


def for_log(text: str) -> str:
    """Show a text in one line, of a log or an error: line breaks, too, by their code."""
    return _escape(text)


def for_markdown(text: str) -> str:
    """Show a text as it is within a line or a table's cell of Markdown, whether HTML is understood there or not."""
    return _MARKDOWN.sub(r"\\\g<0>", for_log(text))


def for_python(text: str) -> str:
    """Write a text as a Python string, quotes included."""
    return '"' + _escape(text.replace("\\", r"\\").replace('"', r"\"")) + '"'


def for_shell(text: str) -> str:
    """Write a text as one word of a command in bash, without line breaks."""
    if (shown := for_log(text)) == text:
        return shlex.quote(text)
    shown = "".join(_spell_byte(one) or _escape(one) for one in text.replace("\\", r"\\").replace("'", r"\'"))
    return f"$'{shown}'"


def _escape(text: str, kept: str = "") -> str:
    return "".join(_show_code(one) if _is_invisible(one) and one not in kept else one for one in text)


def _is_invisible(character: str) -> bool:
    return unicodedata.category(character) in _INVISIBLE and character not in _JOINERS


def _show_code(character: str) -> str:
    """The code as Python and bash read it: above ASCII, two hex digits are a character to one, a byte to the other."""
    code = ord(character)
    if short := {"\n": r"\n", "\r": r"\r", "\t": r"\t"}.get(character, ""):
        return short
    return f"\\x{code:02x}" if code < 0x80 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def _spell_byte(character: str) -> str:
    """The byte of a file's name that is not UTF-8, which Python reads as half a character; empty for all else."""
    return f"\\x{ord(character) - 0xDC00:02x}" if "\udc80" <= character <= "\udcff" else ""


def replace_halves(text: str) -> str:
    """A text whose halves of characters, which JSON can spell and no tokenizer reads, are replacement characters."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
