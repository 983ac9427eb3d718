"""Escape names and texts of any origin, with one function for each place where they are shown.

A folder, a prompt, a model's text, a setting in someone's `plan.json` or another library's error may contain anything:
terminal controls, characters that reverse a line's direction, markup, quotes, line breaks.
"""

import re
import shlex
import unicodedata

_INVISIBLE = ("Cc", "Cf", "Cs", "Zl", "Zp")
"""Unicode categories without a shape of their own: controls, formats, halves of characters, separators."""
_JOINERS = "\u200c\u200d"
"""Format characters that words of some languages, and emojis, need."""
_MARKDOWN = re.compile(r"[\\`*_\[\]<>|&~#$@]|:(?=//)|(?<=www)\.", re.IGNORECASE)
"""Characters with a meaning in the middle of a line of Markdown; addresses become links by themselves."""


def for_terminal(text: str) -> str:
    """Escape a text for a terminal: line breaks and tabs stay, terminal controls become codes.

    Args:
        text: text of any origin; Windows' line breaks become plain ones.
    """
    return _escape(text.replace("\r\n", "\n"), "\n\t")


def for_log(text: str) -> str:
    """Escape a text for one line of a log or an error: line breaks also become codes."""
    return _escape(text)


def for_markdown(text: str) -> str:
    """Escape a text for a line or a table's cell of Markdown, whether HTML is enabled there or not."""
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
    """Return a character's code for Python and bash; above ASCII, both read four or eight hex digits as a character."""
    code = ord(character)
    if short := {"\n": r"\n", "\r": r"\r", "\t": r"\t"}.get(character, ""):
        return short
    return f"\\x{code:02x}" if code < 0x80 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def _spell_byte(character: str) -> str:
    """Return the code of a byte in a file's name that is not UTF-8, which Python reads as half a character; else ''."""
    return f"\\x{ord(character) - 0xDC00:02x}" if "\udc80" <= character <= "\udcff" else ""


def replace_halves(text: str) -> str:
    """Replace halves of characters, which JSON can express but tokenizers cannot read, by replacement characters."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
