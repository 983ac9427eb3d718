"""Types of weights: the names that settings have for them, and what a config says of its own."""

import torch
from transformers import PretrainedConfig

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "auto": "auto"}
"""Name -> type, as `model.dtype` takes it; `auto` is the checkpoint's own."""


def check_dtype(dtype: str) -> None:
    """Refuse a type of weights by a name that is none of `DTYPES`.

    Raises:
        ValueError: with the names.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")


def name_dtype(dtype: object) -> str:
    """The name of a type: `bfloat16`."""
    return str(dtype).removeprefix("torch.")


def read_dtype(config: PretrainedConfig) -> torch.dtype | None:
    """The type that a model's weights were published in; None where its config does not say."""
    dtype: torch.dtype | None = getattr(config, "dtype", None)
    return dtype
