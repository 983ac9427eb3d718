"""Read JSON from any source safely: size and depth are bounded, keys are unique, numbers are finite."""

import json
import math
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

LARGEST_FILE = 2**27
"""Largest size in bytes; the largest tokenizers and plans have a third of it."""
_DEEPEST = 64
"""Largest number of nested containers, far below the limit of recursive functions."""
_LONGEST_NUMBER = 40
"""Largest number of digits of a whole number: these are all finite floats, and tokenizers write 10^30 for no limit."""
_SHOWN = 40
"""Largest number of a key's or number's characters to show."""
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def read_json(path: str | Path, what: str = "JSON file") -> Any:
    """Read a JSON file.

    Args:
        path: path of the file.
        what: name of its content, for errors.

    Raises:
        ValueError: if the file is missing, cannot be read, or is refused by `parse_json`.
    """
    path = Path(path)
    try:
        if path.exists() and not path.is_file():
            raise ValueError(f"{path} is not a {what}: not a file")
        with path.open("rb") as file:  # special files such as /dev/zero never end
            content = file.read(LARGEST_FILE + 1)
    except FileNotFoundError:
        raise ValueError(f"no {what} at {path}") from None
    except OSError as error:
        raise ValueError(f"cannot read a {what} from {path} ({error.strerror})") from None
    try:
        return parse_json(content)
    except ValueError as error:
        raise ValueError(f"{path} is not a {what}: {error}") from None


def parse_json(content: bytes | str) -> Any:
    """Parse JSON.

    Raises:
        ValueError: with the reason, as part of a sentence: more than 128 MiB, nested more than 64 deep, a duplicate
            key, numbers that are not finite or have more than 40 digits, halves of characters, a byte order mark, or
            not JSON in UTF-8.
    """
    if len(content) > LARGEST_FILE:
        raise ValueError(f"larger than {LARGEST_FILE // 2**20} MiB")
    try:
        text = content.decode() if isinstance(content, bytes) else content
    except UnicodeDecodeError:
        raise ValueError("not JSON (its text is not UTF-8)") from None
    try:
        value = json.loads(
            text,
            object_pairs_hook=_make_dict,
            parse_int=_parse_int,
            parse_float=_parse_float,
            parse_constant=_refuse_number,
        )
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error})") from None
    except RecursionError:
        raise ValueError(f"nested more than {_DEEPEST} deep") from None
    _check_depth(value)
    if _SURROGATE.search(text):
        _check_characters(value)
    return value


def _make_dict(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        name = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"key {name[:_SHOWN]!r} occurs twice")
    return result


def _parse_int(text: str) -> int:
    if len(text) > _LONGEST_NUMBER:
        raise ValueError(f"a number has {len(text)} digits, but at most {_LONGEST_NUMBER} are allowed")
    return int(text)


def _parse_float(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _refuse_number(text)


def _refuse_number(text: str) -> NoReturn:
    raise ValueError(f"number {text[:_SHOWN]} is not finite")


def _check_depth(value: Any) -> None:
    level, depth = [value], 0
    while level := [child for parent in level for child in _list_children(parent) if isinstance(child, (dict, list))]:
        depth += 1
        if depth >= _DEEPEST:
            raise ValueError(f"nested more than {_DEEPEST} deep")


def _list_children(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def _check_characters(value: Any) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"it has half of a character, \\u{ord(error.object[error.start]):04x}") from None
