"""Save models, have an engine read the folders in its own process, and hold its answers against PyTorch's."""

import json
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from gqaprune.checkpoints.save import save
from gqaprune.surgery.cut import apply_plan

from cuts import make_plan, narrow
from tiny import make_model, make_tokenizer, rebuild

HERE = Path(__file__).parent
ANY_COUNTS = ([[0, 2], [1], [0, 1, 2]], [[3, 9, 40], list(range(50)), list(range(90))])
EQUAL_COUNTS = ([[0, 2]] * 3, [list(range(50))] * 3)
WHOLE_ATTENTION = ([[0, 1, 2]] * 3, ANY_COUNTS[1])
FIVE_SHAPES = (
    [[0], [1, 2], [0, 1, 2, 3], [0, 2, 3], [3]],
    [list(range(width)) for width in (17, 96, 64, 33, 80)],
)
PROMPT, GENERATED = 32, 16


@dataclass(frozen=True)
class Case:
    """What an engine is asked about.

    Args:
        make: makes the pruned model.
        format: that it is saved in.
        arguments: further ones of the engine.
        tolerance: of log-probabilities.
    """

    make: Callable[[], PreTrainedModel]
    format: str = "per-layer"
    arguments: dict[str, Any] = field(default_factory=dict)
    tolerance: float = 1e-4


def cut(variant: str, kept: Any = ANY_COUNTS, ratio: int = 3, kv_heads: int = 3, **settings: Any) -> PreTrainedModel:
    """A pruned model with heads of 32, the smallest that vLLM computes with on a CPU."""
    model = make_model(variant, kv_heads=kv_heads, ratio=ratio, head_dim=32, channels=96, layers=len(kept[0]))
    if settings:
        model = rebuild(model, std=0.1, **settings)
    apply_plan(model, make_plan(model, *kept))
    return model


def cut_channels(variant: str, ratio: int = 3, **settings: Any) -> PreTrainedModel:
    """A model that lost channels alone, whose heads of 32 fill its width."""
    model = make_model(variant, head_dim=32, channels=600, ratio=ratio)
    return narrow(rebuild(model, std=0.06, hidden_size=64 * ratio, **settings))


def ask(
    python: Path, script: str, cases: Mapping[str, Case], root: Path, environment: dict[str, str]
) -> dict[str, Any]:
    """Name -> PyTorch's answer and the engine's, which is started once for all cases."""
    ids = torch.randint(0, 256, (1, PROMPT), generator=torch.Generator().manual_seed(0))
    questions, expected = [], []
    for name, case in cases.items():
        model = case.make()
        assert save(model, make_tokenizer(), root / name, format=case.format) == case.format
        questions.append({"folder": str(root / name), "ids": ids[0].tolist(), "arguments": case.arguments})
        with torch.inference_mode():
            text = model.generate(
                ids[:, : PROMPT - GENERATED],
                max_new_tokens=GENERATED,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
            scores = model(ids).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])
        expected.append({"log_probabilities": scores[:, 0].tolist(), "text": text[0, -GENERATED:].tolist()})
    (root / "questions.json").write_text(json.dumps(questions))
    command = [python, HERE / script, root / "questions.json", root / "answers.json"]
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True)
    assert (root / "answers.json").exists(), done.stderr[-3000:]
    found = json.loads((root / "answers.json").read_text())
    found += [{"error": "not asked: the engine failed before"}] * (len(cases) - len(found))
    return {name: answers for name, *answers in zip(cases, expected, found, strict=True)}


def check(case: Case, expected: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """See that an engine computes what PyTorch does."""
    assert "error" not in found, found["error"]
    assert found["log_probabilities"] == pytest.approx(expected["log_probabilities"], abs=case.tolerance)
    assert found["text"] == expected["text"]
