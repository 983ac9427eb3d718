"""Types of weights: their names in settings, and the type in a config."""

import torch
from transformers import PretrainedConfig

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "auto": "auto"}
"""Name in `model.dtype` -> type; `auto` is the type in the checkpoint."""


def check_dtype(dtype: str) -> None:
    """Raise an error if a name is not in `DTYPES`.

    Raises:
        ValueError: with the names.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")


def name_dtype(dtype: object) -> str:
    """Return the name of a type, such as `bfloat16`."""
    return str(dtype).removeprefix("torch.")


def read_dtype(config: PretrainedConfig) -> torch.dtype | None:
    """Read the type in which a model's weights were published; None if its config does not say."""
    dtype: torch.dtype | None = getattr(config, "dtype", None)
    return dtype
