"""Check the bounds of a config's values before anything is built or counted from them."""

from collections.abc import Iterator, Mapping
from typing import Any

from gqaprune.models.dtypes import DTYPES, name_dtype

LARGEST: Mapping[str, int] = {
    "num_hidden_layers": 2**10,
    "num_attention_heads": 2**14,
    "num_key_value_heads": 2**14,
    "head_dim": 2**14,
    "hidden_size": 2**20,
    "intermediate_size": 2**22,
    "moe_intermediate_size": 2**22,
    "shared_expert_intermediate_size": 2**22,
    "vocab_size": 2**24,
    "num_experts": 2**14,
    "num_local_experts": 2**14,
    "num_experts_per_tok": 2**14,
    "max_position_embeddings": 2**40,
}
"""Count in a config -> its largest value, far above that of every published model."""
_WIDEST = 2**63
"""Bound of whole numbers in torch."""
_OPTIONAL = ("head_dim", "num_key_value_heads")
"""Settings that may be null, because they follow from others."""


def check_bounds(settings: Any) -> None:
    """Raise an error if any value in `config.json`, however deeply nested, is out of its bounds.

    Raises:
        ValueError: with the first such setting and its bounds.
    """
    if not isinstance(settings, dict):
        raise ValueError(f"it must be an object with settings, got {type(settings).__name__}")
    for name, value in _list_settings(settings):
        if name in LARGEST and not (value is None and (name in _OPTIONAL or "expert" in name)):
            check_count(name, value)
        if isinstance(value, int) and not -_WIDEST <= value < _WIDEST:
            raise ValueError(f"{name} is a number of {len(str(value))} digits, which is too large for any setting")


def check_count(name: str, value: Any) -> None:
    """Raise an error if a value is not a whole number within the setting's bounds.

    Raises:
        ValueError: with the bounds.
    """
    smallest, largest = 0 if "expert" in name else 1, LARGEST[name]
    if not isinstance(value, int) or isinstance(value, bool) or not smallest <= value <= largest:
        raise ValueError(f"{name} must be a whole number from {smallest} to {largest:,}, got {str(value)[:40]!r}")


def check_type(dtype: object) -> None:
    """Raise an error if models cannot compute in a type of weights.

    Raises:
        ValueError: with the types that are supported.
    """
    if dtype is not None and dtype not in DTYPES.values():
        known = ", ".join(name_dtype(one) for one in DTYPES.values() if one != "auto")
        raise ValueError(f"dtype must be one of {known}, got {name_dtype(dtype)[:40]!r}")


def _list_settings(settings: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield name and value of every setting, nested ones included."""
    for name, value in settings.items():
        yield name, value
        parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        for part in (value, *parts):
            if isinstance(part, dict):
                yield from _list_settings(part)
