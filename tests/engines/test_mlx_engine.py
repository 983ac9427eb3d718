"""mlx-lm builds each layer at its own size."""

from pathlib import Path

import pytest

from cuts import EVEN, UNEVEN, drop_query_heads, make_pruned
from engine import check_engine
from tiny import LLAMA3, rebuild


@pytest.mark.parametrize("variant", ["llama-biases", "mistral", "qwen2", "qwen2-tied", "qwen3"])
def test_units_gone_from_some_layers_leave_the_same_text(variant: str, tmp_path: Path) -> None:
    check_engine("mlx", make_pruned(variant, UNEVEN), "mlx", tmp_path)


def test_query_heads_gone_from_some_layers_leave_the_same_text(tmp_path: Path) -> None:
    check_engine("mlx", drop_query_heads("qwen2", [[0, 1, 7, 8], None, [6, 7]]), "mlx", tmp_path)


def test_scaled_rotary_embedding_is_found_in_the_config(tmp_path: Path) -> None:
    check_engine("mlx", rebuild(make_pruned("llama", UNEVEN), rope_parameters=LLAMA3), "mlx", tmp_path)


def test_equal_counts_keep_their_rotary_embedding(tmp_path: Path) -> None:
    check_engine("mlx", rebuild(make_pruned("llama", EVEN), rope_parameters=LLAMA3), "mlx", tmp_path)
