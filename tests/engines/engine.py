"""Engines beside PyTorch; each has a Python of its own, which `VLLM_PYTHON` or `MLX_PYTHON` names.

Their dependencies are at odds with gqaprune's (vLLM 0.32 wants transformers below 5.20), so that each has an
environment of its own: `python -m venv mlx && mlx/bin/pip install 'mlx[cpu]' mlx-lm`, then
`MLX_PYTHON=mlx/bin/python pytest tests/engines`. Without it these tests are skipped.
"""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from gqaprune import save

from tiny import make_tokenizer, make_tokens

PYTHONS = {"vllm": os.environ.get("VLLM_PYTHON", ""), "mlx": os.environ.get("MLX_PYTHON", "")}
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
"""For vLLM on a few cores that others use too."""
GENERATED = 16


def check_engine(engine: str, model: PreTrainedModel, format: str, folder: Path) -> None:
    """Save a model, and see that an engine gives tokens the same log-probabilities and goes on with the same ones."""
    if not PYTHONS[engine]:
        pytest.skip(f"{engine.upper()}_PYTHON names no Python with {engine}")
    tokens = make_tokens(length=48)
    save(model, make_tokenizer(), folder / "out", format=format)
    (folder / "request").write_text(json.dumps({"prompts": tokens.tolist(), "generated": GENERATED}))
    command = [PYTHONS[engine], READER, engine, folder / "out", folder / "request", folder / "answer"]
    subprocess.run(command, check=True, env={**os.environ, **CALM})
    answer = json.loads((folder / "answer").read_text())
    with torch.no_grad():
        expected = model(tokens).logits[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]
    torch.testing.assert_close(torch.tensor(answer["scores"]), expected, atol=1e-4, rtol=0)
    assert answer["texts"] == _continue_greedily(model, tokens)


def _continue_greedily(model: PreTrainedModel, tokens: torch.Tensor) -> list[list[int]]:
    """The likeliest tokens that follow, end of text among them."""
    length = tokens.shape[1]
    with torch.no_grad():
        for _ in range(GENERATED):
            tokens = torch.cat([tokens, model(tokens).logits[:, -1:].argmax(-1)], dim=1)
    return tokens[:, length:].tolist()
