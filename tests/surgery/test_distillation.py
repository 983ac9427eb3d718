"""The last step of repair brings predictions nearer to the dense model's, or changes nothing."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from gqaprune import PruningConfig, prune
from gqaprune.common.stage_cache import StageCache
from gqaprune.placement.model_hash import hash_model
from gqaprune.reporting.report import Report
from gqaprune.surgery.distillation import split_windows

from tiny import VOCABULARY, make_model, make_tokens

EVERY_TOKEN = "gqaprune.surgery.distillation.TOP_K"
BATCHES = [make_tokens(2, seed=seed) for seed in range(8)]
ONE = [torch.cat(BATCHES)]
"""Judged on what is trained on: of random text nothing else can be learnt."""


def run(
    stages: StageCache | None = None,
    dtype: torch.dtype = torch.float32,
    batches: Sequence[Tensor] = BATCHES,
    **repair: Any,
) -> tuple[PreTrainedModel, Report]:
    model = make_model("llama", kv_heads=4, channels=48).to(dtype)
    config = PruningConfig(0.3, repair={"epochs": 0, "products": "float32", "distill_tokens": 4096, **repair})
    return model, prune(model, batches, config, stages=stages)[1]


def diverge(model: PreTrainedModel) -> float:
    """From the dense model, on the whole text."""
    with torch.no_grad():
        dense, other = (
            one(ONE[0]).logits[:, :-1].double().log_softmax(-1)
            for one in (make_model("llama", kv_heads=4, channels=48), model)
        )
    return float((dense.exp() * (dense - other)).sum(-1).mean())


def test_divergence_falls_and_is_what_the_report_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EVERY_TOKEN, VOCABULARY)
    repaired, _ = run(batches=ONE, distill_tokens=0)
    model, report = run(batches=ONE, distill_learning_rate=0.02)
    assert report.distillation is not None and report.distillation.is_kept
    assert report.distillation.divergence_before == pytest.approx(diverge(repaired), rel=1e-2)
    assert report.distillation.divergence_after == pytest.approx(diverge(model), rel=1e-2)
    assert diverge(model) < diverge(repaired)
    assert Report.from_dict(report.to_dict()).distillation == report.distillation
    assert "nats per token on held-out windows" in report.distillation.describe()
    assert not any(parameter.grad is not None for parameter in model.parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert model.model.embed_tokens.weight.equal(repaired.model.embed_tokens.weight)


def test_weights_that_are_no_better_are_not_kept() -> None:
    repaired, none = run(distill_tokens=0)
    model, report = run(distill_learning_rate=1.0)
    assert report.distillation is not None and not report.distillation.is_kept and none.distillation is None
    assert hash_model(model) == hash_model(repaired)
    assert "no improvement, so the weights are unchanged" in report.distillation.describe()


def test_projections_change_by_low_rank_and_nothing_else_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gqaprune.surgery.distillation.RANK", 2)
    before, after = (run(batches=ONE, distill_tokens=tokens)[0].state_dict() for tokens in (0, 4096))
    for name, weight in after.items():
        if "_proj" in name:
            change = torch.linalg.svdvals((weight - before[name]).double())
            assert change[1] > 0 and change[2] < 1e-5 * change[0], name
        else:
            assert weight.equal(before[name]), name


def test_windows_come_from_all_over_the_text() -> None:
    trained, judged = split_windows(BATCHES, {7}, 7 * BATCHES[0].shape[1])
    assert trained.equal(torch.cat(BATCHES[:7])[::2]) and judged.equal(BATCHES[7])


def test_narrow_weights_are_trained_wide_and_stay_narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EVERY_TOKEN, VOCABULARY)
    model, report = run(batches=ONE, dtype=torch.bfloat16, distill_learning_rate=0.02)
    assert report.distillation is not None and report.distillation.is_kept
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_tokens_bound_it_and_the_text_is_passed_three_times_at_most() -> None:
    windows, length = 14, BATCHES[0].shape[1]
    assert run(distill_tokens=4 * length)[1].distillation.tokens == 4 * length  # type: ignore[union-attr]
    assert run()[1].distillation.tokens == 3 * windows * length  # type: ignore[union-attr]


def test_a_run_that_was_stopped_ends_with_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, report = run()
    stages = StageCache(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("gqaprune.pipeline.distill", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(stages)
    assert hash_model(run(stages)[0]) == hash_model(whole)
    with monkeypatch.context() as patch:
        patch.setattr("gqaprune.pipeline.distill", lambda *_: pytest.fail("trained again"))
        again, resumed = run(stages)
    assert hash_model(again) == hash_model(whole) and resumed.distillation == report.distillation


def test_a_loss_that_is_not_finite_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    nothing = torch.tensor(float("nan"), requires_grad=True)
    monkeypatch.setattr("gqaprune.surgery.distillation.measure_divergence_from_top", lambda *_: nothing)
    with pytest.raises(ValueError, match="not finite at step 0 of distillation: lower repair.distill_learning_rate"):
        run()
