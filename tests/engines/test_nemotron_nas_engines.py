"""Engines read a Nemotron-NAS folder as PyTorch reads the model; skipped unless VLLM_PYTHON or MLX_PYTHON names theirs.

Their dependencies are at odds with gqaprune's (vLLM 0.32 wants transformers below 5.20), so that each has an
environment of its own: `python -m venv mlx && mlx/bin/pip install 'mlx[cpu]' mlx-lm`, then
`MLX_PYTHON=mlx/bin/python pytest tests/engines`.
"""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from gqaprune import save

from cuts import narrow
from tiny import make_model, make_tokenizer, make_tokens, rebuild

ENGINES = {"vllm": os.environ.get("VLLM_PYTHON", ""), "mlx": os.environ.get("MLX_PYTHON", "")}
READER = Path(__file__).parent / "read_with_engine.py"
CALM = {
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "passive",
    "GOMP_SPINCOUNT": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "PYTHONPATH": "",
}
"""Where vLLM shares two cores with others."""
SETTINGS = {
    "llama": {"rope_parameters": {"rope_type": "linear", "rope_theta": 5e4, "factor": 2.0}},
    "mistral": {},
    "qwen2": {},
    "qwen2-tied": {},
}
GENERATED = 16


def make_wide(variant: str) -> PreTrainedModel:
    """A model with heads of 32, which vLLM's attention on CPUs wants, and MLPs of unequal width."""
    ratio = 7 if variant == "qwen2" else 3
    model = make_model(variant, head_dim=None, channels=600, ratio=ratio)
    hidden = 32 * model.config.num_attention_heads
    return narrow(rebuild(model, hidden_size=hidden, head_dim=32, std=0.06, **SETTINGS[variant]))


@pytest.mark.parametrize("variant", list(SETTINGS))
@pytest.mark.parametrize("engine", list(ENGINES))
def test_engine_gives_the_same_log_probabilities_and_text(engine: str, variant: str, tmp_path: Path) -> None:
    if not ENGINES[engine]:
        pytest.skip(f"{engine.upper()}_PYTHON names no Python with {engine}")
    model, tokens = make_wide(variant), make_tokens(length=48)
    save(model, make_tokenizer(), tmp_path / "out", format="nemotron-nas")
    request = {"prompts": tokens.tolist(), "generated": GENERATED}
    (tmp_path / "request").write_text(json.dumps(request))
    command = [ENGINES[engine], READER, engine, tmp_path / "out", tmp_path / "request", tmp_path / "answer"]
    subprocess.run(command, check=True, env={**os.environ, **CALM})
    answer = json.loads((tmp_path / "answer").read_text())
    with torch.no_grad():
        expected = model(tokens).logits[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]
    torch.testing.assert_close(torch.tensor(answer["scores"]), expected, atol=1e-4, rtol=0)
    assert answer["texts"] == continue_greedily(model, tokens)


def continue_greedily(model: PreTrainedModel, tokens: torch.Tensor) -> list[list[int]]:
    """The likeliest tokens that follow, end of text among them."""
    length = tokens.shape[1]
    with torch.no_grad():
        for _ in range(GENERATED):
            tokens = torch.cat([tokens, model(tokens).logits[:, -1:].argmax(-1)], dim=1)
    return tokens[:, length:].tolist()
