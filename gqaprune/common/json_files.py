"""Read JSON that someone else may have written: bounded in size and depth, each key once, every number finite."""

import json
import math
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

LARGEST_FILE = 2**27
"""Bytes; the largest tokenizers and plans have a third of them."""
_DEEPEST = 64
"""Containers within each other, far below what recursive functions can follow."""
_LONGEST_NUMBER = 40
"""Characters of a whole number: every such one is a finite float, too, and tokenizers write 10^30 for no limit."""
_SHOWN = 40
"""Characters of a key or a number that are shown at most."""
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def read_json(path: str | Path, what: str = "JSON file") -> Any:
    """Read a JSON file.

    Args:
        path: of the file.
        what: it should be, in a sentence.

    Raises:
        ValueError: if it is missing, cannot be read, or holds what `parse_json` refuses.
    """
    path = Path(path)
    try:
        if path.exists() and not path.is_file():
            raise ValueError(f"{path} is not a {what}: not a file")
        with path.open("rb") as file:  # which grows under some names
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
        ValueError: naming what is wrong, in part of a sentence: more than 128 MiB, nested more than 64 deep, a key that
            is there twice, numbers that are not finite or have more than 40 digits, halves of characters, a byte order
            mark, or no JSON in UTF-8 at all.
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
        raise ValueError(f"key {name[:_SHOWN]!r} is there twice")
    return result


def _parse_int(text: str) -> int:
    if len(text) > _LONGEST_NUMBER:
        raise ValueError(f"a number has {len(text)} digits, at most {_LONGEST_NUMBER} are read")
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
        raise ValueError(f"it spells half of a character, \\u{ord(error.object[error.start]):04x}") from None
