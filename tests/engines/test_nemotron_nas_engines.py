"""Engines read a Nemotron-NAS folder as PyTorch reads the model."""

from pathlib import Path

import pytest

from cuts import narrow
from engine import PYTHONS, check_engine
from tiny import make_model, rebuild

SETTINGS = {
    "llama": {"rope_parameters": {"rope_type": "linear", "rope_theta": 5e4, "factor": 2.0}},
    "mistral": {},
    "qwen2": {},
    "qwen2-tied": {},
}


@pytest.mark.parametrize("variant", list(SETTINGS))
@pytest.mark.parametrize("engine", list(PYTHONS))
def test_engine_gives_the_same_log_probabilities_and_text(engine: str, variant: str, tmp_path: Path) -> None:
    model = make_model(variant, head_dim=None, channels=600, ratio=7 if variant == "qwen2" else 3)
    hidden = 32 * model.config.num_attention_heads  # vLLM's attention on CPUs wants heads of 32
    model = rebuild(model, hidden_size=hidden, head_dim=32, std=0.06, **SETTINGS[variant])
    check_engine(engine, narrow(model), "nemotron-nas", tmp_path)
