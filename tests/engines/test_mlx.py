"""mlx-lm builds each layer at its own size and computes what PyTorch does."""

from pathlib import Path
from typing import Any

import pytest
from asking import EQUAL_COUNTS, FIVE_SHAPES, Case, ask, check, cut, cut_channels

from cuts import drop_query_heads
from tiny import LLAMA3

LINEAR = {"rope_type": "linear", "rope_theta": 5e4, "factor": 2.0}
CASES = {
    "llama, biases": Case(lambda: cut("llama-biases"), "mlx"),
    "llama, scaled": Case(lambda: cut("llama", rope_parameters=LLAMA3), "mlx"),
    "llama, scaled, equal counts": Case(lambda: cut("llama", EQUAL_COUNTS, rope_parameters=LLAMA3), "mlx"),
    "mistral": Case(lambda: cut("mistral"), "mlx"),
    "qwen2, 7:1": Case(lambda: cut("qwen2", FIVE_SHAPES, ratio=7, kv_heads=4), "mlx"),
    "qwen2, query heads": Case(lambda: drop_query_heads("qwen2", [[0, 1, 7, 8], None, [6, 7]]), "mlx"),
    "qwen2, tied": Case(lambda: cut("qwen2-tied"), "mlx"),
    "qwen3": Case(lambda: cut("qwen3"), "mlx"),
    "llama, DeciLM": Case(lambda: cut_channels("llama", rope_parameters=LINEAR), "nemotron-nas"),
    "mistral, DeciLM": Case(lambda: cut_channels("mistral"), "nemotron-nas"),
    "qwen2, DeciLM": Case(lambda: cut_channels("qwen2", ratio=7), "nemotron-nas"),
}
"""Name -> what mlx-lm is asked about."""


@pytest.fixture(scope="module")
def answers(engines: Path, environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Name -> PyTorch's answer and mlx-lm's."""
    return ask(engines / "python", "ask_mlx.py", CASES, tmp_path_factory.mktemp("mlx"), environment)


@pytest.mark.parametrize("name", CASES)
def test_mlx_computes_what_pytorch_does(name: str, answers: dict[str, Any]) -> None:
    check(CASES[name], *answers[name])
