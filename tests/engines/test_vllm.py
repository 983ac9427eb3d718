"""vLLM serves every folder that we write at its own size, with PyTorch's log-probabilities and greedy text."""

import json
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import gqaprune
from gqaprune.checkpoints.save import save
from gqaprune.models.architecture import read_geometry
from gqaprune.surgery.cut import apply_plan

from cuts import make_plan
from tiny import make_model, make_tokenizer

ANY_COUNTS = ([[0, 2], [1], [0, 1, 2]], [[3, 9, 40], list(range(50)), list(range(90))])
EQUAL_COUNTS = ([[0, 2]] * 3, [list(range(50))] * 3)
WHOLE_ATTENTION = ([[0, 1, 2]] * 3, ANY_COUNTS[1])
FIVE_SHAPES = (
    [[0], [1, 2], [0, 1, 2, 3], [0, 2, 3], [3]],
    [list(range(width)) for width in (17, 96, 64, 33, 80)],
)


def cut(variant: str, kept: Any = ANY_COUNTS, ratio: int = 3, kv_heads: int = 3, **shapes: Any) -> PreTrainedModel:
    """A model with heads of 32, the smallest that vLLM computes with on a CPU."""
    model = make_model(variant, kv_heads=kv_heads, ratio=ratio, head_dim=32, channels=96, layers=len(kept[0]))
    apply_plan(model, make_plan(model, *kept))
    return model


def cut_smollm() -> PreTrainedModel:
    """SmolLM2-135M without a third of its KV heads in some layers, and of its channels in all but the first."""
    model = gqaprune.load_model("smollm2-135m", dtype="float32")
    layers = range(model.config.num_hidden_layers)
    groups = [[0, 2] if layer % 3 == 1 else [0, 1, 2] for layer in layers]
    apply_plan(model, make_plan(model, groups, [list(range(1536 - 17 * layer)) for layer in layers]))
    return model


@dataclass(frozen=True)
class Case:
    """A pruned model, the format it is saved in, and arguments of vLLM."""

    make: Callable[[], PreTrainedModel]
    format: str = "per-layer"
    arguments: dict[str, Any] = field(default_factory=lambda: {"trust_remote_code": True})
    tolerance: float = 1e-4


BY_TRANSFORMERS = {"model_impl": "transformers"}
CASES = {
    "llama": Case(lambda: cut("llama")),
    "llama, biases": Case(lambda: cut("llama-biases")),
    "llama of one KV head": Case(lambda: cut("llama", ([[0]] * 3, ANY_COUNTS[1]), kv_heads=1)),
    "qwen2, 7:1": Case(lambda: cut("qwen2", FIVE_SHAPES, ratio=7, kv_heads=4)),
    "qwen2, tied": Case(lambda: cut("qwen2-tied", ratio=7)),
    "qwen3": Case(lambda: cut("qwen3")),
    "mistral": Case(lambda: cut("mistral")),
    "mistral, sliding": Case(lambda: cut("mistral-sliding")),
    "gemma2": Case(lambda: cut("gemma2")),
    "gemma3": Case(lambda: cut("gemma3")),
    "granite": Case(lambda: cut("granite")),
    "exaone4": Case(lambda: cut("exaone4")),
    "olmo2": Case(lambda: cut("olmo2", WHOLE_ATTENTION)),
    "phi3": Case(lambda: cut("phi3")),
    "smollm3": Case(lambda: cut("smollm3")),
    "llama, stock": Case(lambda: cut("llama", EQUAL_COUNTS), "stock", {}),
    "qwen2, stock": Case(lambda: cut("qwen2", EQUAL_COUNTS, ratio=7), "stock", BY_TRANSFORMERS),
    "llama, padded": Case(lambda: cut("llama"), "padded", {}),
    "qwen2, padded": Case(lambda: cut("qwen2", ratio=7), "padded", BY_TRANSFORMERS),
    "smollm2": Case(cut_smollm, tolerance=1e-3),
}
"""Name -> what vLLM is asked about; a family or a format is a line."""


@pytest.fixture(scope="module")
def answers(
    engines: Path, engines_environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """Name -> PyTorch's answer and vLLM's, which starts once for all of them."""
    root = tmp_path_factory.mktemp("vllm")
    ids = torch.randint(0, 256, (1, 32), generator=torch.Generator().manual_seed(0))
    questions, expected = [], {}
    for name, case in CASES.items():
        model = case.make()
        assert save(model, make_tokenizer(), root / name, format=case.format) == case.format
        with torch.inference_mode():
            log_probabilities = model(ids).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])[:, 0]
            text = model.generate(ids[:, :16], max_new_tokens=16, do_sample=False, eos_token_id=None, pad_token_id=0)
        expected[name] = {
            "log_probabilities": log_probabilities.tolist(),
            "text": text[0, 16:].tolist(),
            "kv_heads": read_geometry(model.config).kv_heads,
        }
        questions.append({"folder": str(root / name), "ids": ids[0].tolist(), "arguments": case.arguments})
    (root / "questions.json").write_text(json.dumps(questions))
    script = Path(__file__).parent / "ask_vllm.py"
    done = subprocess.run(
        [engines / "python", script, root / "questions.json", root / "answers.json"],
        env={**engines_environment, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"},  # several models in one process
        cwd=root,
        capture_output=True,
        text=True,
    )
    assert (root / "answers.json").exists(), done.stderr[-3000:]
    found = json.loads((root / "answers.json").read_text())
    found += [{"error": "not asked, for vLLM failed before"}] * (len(CASES) - len(found))
    return {name: (expected[name], answer) for name, answer in zip(CASES, found, strict=True)}


@pytest.mark.parametrize("name", CASES)
def test_vllm_computes_what_pytorch_does(name: str, answers: dict[str, tuple[dict[str, Any], dict[str, Any]]]) -> None:
    expected, found = answers[name]
    assert "error" not in found, found["error"]
    assert found["log_probabilities"] == pytest.approx(expected["log_probabilities"], abs=CASES[name].tolerance)
    assert found["text"] == expected["text"]
