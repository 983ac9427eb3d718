"""Lists of names, put into our sentences."""

from collections.abc import Mapping, Sequence


def join_choices(names: Sequence[str]) -> str:
    """`a, b or c`, as an error lists what can be chosen."""
    *others, last = names
    return f"{', '.join(others)} or {last}" if others else last


def describe_choices(summaries: Mapping[str, str]) -> str:
    """Names with what they mean, as help texts list them: `a` (first), `b` (second) or `c` (third)."""
    return join_choices([f"`{name}` ({summary})" for name, summary in summaries.items()])
