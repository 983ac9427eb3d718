"""Check that settings in Python have the types of their fields, as on the command line."""

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
"""Type of a field -> type that it accepts, and its name in errors."""


def check_field_types(settings: Any) -> None:
    """Raise an error if a dataclass has a value of another type than its field, which would fail much later.

    Only numbers, names and switches are checked.

    Raises:
        ValueError: with the first such field.
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
