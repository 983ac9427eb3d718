"""Settings in Python have the types that their fields say, as those of the command line have."""

from dataclasses import fields
from numbers import Integral, Real
from types import UnionType
from typing import Any, get_args

_KINDS: dict[type, tuple[type, str]] = {
    bool: (bool, "true or false"),
    int: (Integral, "a whole number"),
    float: (Real, "a number"),
    str: (str, "a name"),
}
"""Type of a field -> what it takes, and how that is called."""


def check_field_types(settings: Any) -> None:
    """Refuse values of a dataclass that are not what its fields say: a name for a number would fail far from here.

    Fields of other types than numbers, names and switches are left to their own checks.

    Raises:
        ValueError: naming the first.
    """
    for field in fields(settings):
        value = getattr(settings, field.name)
        options = get_args(field.type) if isinstance(field.type, UnionType) else (field.type,)
        kinds = [_KINDS[option] for option in options if option in _KINDS]
        if not kinds or (value is None and type(None) in options):
            continue
        is_switch = isinstance(value, bool) and bool not in options
        if is_switch or not any(isinstance(value, kind) for kind, _ in kinds):
            raise ValueError(f"{field.name} must be {' or '.join(name for _, name in kinds)}, got {str(value)[:40]!r}")
