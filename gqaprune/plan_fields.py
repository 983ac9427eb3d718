"""Read and check the fields of a plan. Plans may come from untrusted sources."""

import reprlib
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NoReturn

_LONGEST_NAME = 4096
"""Largest number of characters of a model's name or path."""
_SEEDS = range(-(2**63), 2**64)
"""Seeds that torch accepts."""


def read_whole_numbers(values: Sequence[Any]) -> tuple[int, ...]:
    """Return values as a tuple, or raise ValueError if one is not a whole number."""
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError(f"units and shapes must be whole numbers, got {reprlib.repr(value)}")
    return tuple(values)


def read_list(value: Any, name: str) -> list[Any]:
    """Return a list, or raise ValueError with the field's name."""
    if isinstance(value, list):
        return value
    _refuse(value, name, "a list")


def read_text(value: Any, name: str) -> str:
    """Return a string of limited length, or raise ValueError with the field's name."""
    if isinstance(value, str) and len(value) <= _LONGEST_NAME:
        return value
    _refuse(value, name, f"text of at most {_LONGEST_NAME:,} characters")


def read_share(value: Any, name: str) -> float:
    """Return a number from 0 to 1, or raise ValueError with the field's name."""
    if isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= 1:
        return float(value)
    _refuse(value, name, "a number from 0 to 1")


def read_seed(value: Any) -> int:
    """Return a seed that torch accepts, or raise ValueError."""
    if isinstance(value, int) and not isinstance(value, bool) and value in _SEEDS:
        return value
    _refuse(value, "seed", "a whole number of at most 64 bits")


def _refuse(value: Any, name: str, expected: str) -> NoReturn:
    raise ValueError(f"the plan's {name} must be {expected}, got {reprlib.repr(value)}")


def check_indexes(kept: tuple[int, ...], count: int, units: str) -> None:
    """Raise ValueError unless `kept` are ascending indexes below `count`, at least one.

    Args:
        kept: indexes of the kept units.
        count: number of units of the dense block.
        units: name of the units for the message, such as `layer 3 GQA groups`.
    """
    if not kept:
        raise ValueError(f"{units}: at least 1 of {count} must stay, got none")
    if any(a >= b for a, b in pairwise(kept)):
        raise ValueError(f"{units}: kept indexes must ascend without repeats")
    if kept[0] < 0 or kept[-1] >= count:
        outside = kept[0] if kept[0] < 0 else kept[-1]
        raise ValueError(f"{units}: index {outside} is outside 0 … {count - 1}")


def check_same_number(queries: tuple[int, ...], groups: tuple[int, ...], ratio: int, units: str) -> None:
    """Raise ValueError unless all kept GQA groups, and no others, keep the same number of query heads.

    Args:
        queries: indexes of the kept query heads.
        groups: indexes of the kept GQA groups.
        ratio: query heads per group of the dense layer.
        units: name of the query heads for the message, such as `layer 3 query heads`.
    """
    heads = Counter(query // ratio for query in queries)
    if removed := sorted(set(heads) - set(groups)):
        raise ValueError(f"{units}: some belong to GQA group {removed[0]}, which is removed")
    if len({heads[group] for group in groups}) != 1:
        few, many = (choose(groups, key=heads.__getitem__) for choose in (min, max))
        raise ValueError(
            f"{units}: every GQA group must keep the same number, got {heads[few]} in group {few} and {heads[many]} "
            f"in group {many}"
        )
