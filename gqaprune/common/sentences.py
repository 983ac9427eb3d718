"""Join lists of names for sentences."""

from collections.abc import Mapping, Sequence


def join_choices(names: Sequence[str]) -> str:
    """Join names as `a, b or c`, for errors."""
    *first, last = names
    return f"{', '.join(first)} or {last}" if first else last


def describe_choices(summaries: Mapping[str, str]) -> str:
    """Join names with their descriptions, for help texts: `a` (first), `b` (second) or `c` (third)."""
    return join_choices([f"`{name}` ({summary})" for name, summary in summaries.items()])
