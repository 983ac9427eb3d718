"""Types of weights by their names."""

import pytest
import torch
from transformers import LlamaConfig

from gqaprune.models.dtypes import DTYPES, check_dtype, name_dtype, read_dtype


def test_names_are_those_of_torch() -> None:
    types = {name: dtype for name, dtype in DTYPES.items() if isinstance(dtype, torch.dtype)}
    assert {name: name_dtype(dtype) for name, dtype in types.items()} == {name: name for name in types}


def test_unknown_name_is_refused_with_the_known_ones() -> None:
    for name in DTYPES:
        check_dtype(name)
    with pytest.raises(ValueError, match="dtype must be one of float32, bfloat16, float16, auto, got 'float8'"):
        check_dtype("float8")


def test_config_says_what_its_weights_were_published_in() -> None:
    assert read_dtype(LlamaConfig()) is None
    assert read_dtype(LlamaConfig(dtype="bfloat16")) == torch.bfloat16
