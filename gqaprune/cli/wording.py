"""Turn parsers' messages about wrong arguments into one sentence."""

import re
from collections.abc import Iterable
from difflib import get_close_matches

from gqaprune.common.renamed import find_renamed_setting

_UNKNOWN = (
    re.compile(r"unrecognized arguments: (?:\S+ )*?(--[\w.-]+)", re.IGNORECASE),
    re.compile(r"does not accept option '([\w.-]+)'"),
    re.compile(r'[Kk]ey "([\w.-]+)" is not expected'),
    re.compile(r"No action for key \"([\w.-]+)\""),
)
_COMMAND = re.compile(r"invalid choice: '([^']*)' \(choose from ([^)]*)\)")
_CLASS = re.compile(r"Problem with given class_path '([\w.]+)': (.*?)(?= - Expected a | Given value type: |$)")
_REFUSED = re.compile(r"Option '([\w.-]+)' is not accepted")
_UNION = re.compile(r"Does not validate against any of the Union subtypes Subtypes: \[(.*?)\] Errors: (?:- )?(.*)")
_TYPE = re.compile(r"Expected a <class '(\w+)'>\. Got value: (.*)")
_NO_CLASS = re.compile(r"Expected a dot import path string: (\S+)")
_KEY = re.compile(r'[Pp]arser key "([\w.-]+)": (.*)')
_ALTERNATIVES = "Does not validate against any of the Union subtypes"
_LONGEST = 300
"""Largest number of a reason's characters to show: parsers print whole values of settings in it."""


def explain(message: str, settings: Iterable[str]) -> str:
    """Turn a parser's message into a sentence that suggests what was meant.

    Args:
        message: message of the parser.
        settings: names of all settings.
    """
    reason = " ".join(message.split()).rstrip(".")
    if (renamed := find_renamed_setting(reason)) is not None:
        return renamed
    if 'key "pruning.split"' in reason:
        return 'pruning.split needs quotes in YAML, such as "2:8": without them YAML reads 2:8 as a number in base 60'
    if found := _COMMAND.search(reason):
        command, commands = found[1], re.findall(r"'([^']*)'", found[2])
        suggestion = _suggest(command, commands) or "."
        return f"there is no command {command}{suggestion} The commands are {', '.join(commands)}"
    for pattern in _UNKNOWN:
        if found := pattern.search(reason):
            name = found[1].removeprefix("--")
            return f"there is no setting --{name}{_suggest(name, settings, '--')}"
    key = _KEY.search(reason)
    place = f"{key[1]}: " if key else ""
    if found := _CLASS.search(reason):
        return f"{place}{found[1].rpartition('.')[2]} cannot be used: {_shorten(found[2])}"
    if found := _NO_CLASS.search(reason):
        return f"{place}there is no class {found[1]}: write its full name, such as package.module.{found[1]}"
    if key and (found := _REFUSED.search(reason)):
        return f"there is no setting --{key[1]}.{found[1]}"
    if found := _UNION.search(reason):
        groups = re.findall(r"Literal\[(.*?)\]", found[1])
        values = [value.strip(" '") for group in groups for value in group.split(",")]
        reasons = f"must be one of {', '.join(dict.fromkeys(values))}" if values else _shorten(found[2])
        return f"{place}{reasons}"
    return f"{place}{_shorten(key[2])}" if key else _shorten(reason)


def explain_error(error: Exception) -> str:
    """Return an error's text; of a parser's long error about a class that it could not build, the line that helps."""
    if isinstance(error, OSError) and error.filename is not None and str(error).startswith("[Errno"):
        return f"cannot use {error.filename}: {error.strerror}; choose another file or folder"
    return explain(str(error), ()) if _ALTERNATIVES in str(error) else str(error)


def _suggest(name: str, known: Iterable[str], prefix: str = "") -> str:
    """Suggest the nearest known name, as a question; a setting may be typed by its last part alone."""
    names = list(known)
    near = get_close_matches(name, names, 1, 0.75)
    last = [one for one in names if one.rpartition(".")[2] == name.rpartition(".")[2]]
    if not near and len(last) == 1:
        near = last
    return f": did you mean {prefix}{near[0]}?" if near else ""


def _shorten(text: str) -> str:
    """Keep the first of several alternatives that a parser lists, without the value that was typed."""
    for end in (" Given value type: ", " Given value: ", " - Expected a "):
        if text.find(end) > 0:
            text = text[: text.find(end)]
    text = _TYPE.sub(r"must be of type \1, got \2", text.strip(" -"))
    return text if len(text) <= _LONGEST else text[:_LONGEST] + " …"
