"""LLM-Pruner's criteria against gradients from plain autograd, members picked by hand."""

from collections.abc import Callable
from dataclasses import replace
from functools import reduce
from typing import Any

import pytest
import torch
from torch import Tensor

from gqaprune.data.calibration import CalibrationSet
from gqaprune.models.architecture import find_blocks
from gqaprune.plan import BlockKey
from gqaprune.scoring.criteria.base import ScoringRun
from gqaprune.scoring.criteria.gradients import GradientCriterion
from gqaprune.scoring.scores import CRITERIA, ScoringConfig, score_units

from tiny import make_model, make_tokens

BATCHES = [make_tokens(2, seed=seed) for seed in range(3)]
FORMULAS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "param_first": lambda w, g, h: (w * g).abs().sum(),
    "param_second": lambda w, g, h: (w * h * w).abs().sum(),
    "param_mix": lambda w, g, h: (w * g - 0.5 * w * h * w).abs().sum(),
    "vectorize": lambda w, g, h: (w * g).sum().abs(),
}
REDUCTIONS: dict[str, Callable[[list[Tensor]], Tensor]] = {
    "sum": sum,  # type: ignore[dict-item]
    "mean": lambda values: sum(values) / len(values),  # type: ignore[arg-type,return-value]
    "max": max,
    "prod": lambda values: reduce(torch.mul, values),
}


def pick_members(model: Any, key: BlockKey, unit: int) -> list[tuple[Tensor, Any]]:
    """Weights and indexes of a unit, with 2 KV heads, 3 query heads each, head_dim 8."""
    layer = model.model.layers[key.layer]
    if key.kind == "mlp":
        mlp = layer.mlp
        return [(mlp.gate_proj.weight, unit), (mlp.up_proj.weight, unit), (mlp.down_proj.weight, (slice(None), unit))]
    attention, query, kv = layer.self_attn, slice(24 * unit, 24 * unit + 24), slice(8 * unit, 8 * unit + 8)
    return [
        (attention.q_proj.weight, query),
        (attention.k_proj.weight, kv),
        (attention.v_proj.weight, kv),
        (attention.o_proj.weight, (slice(None), query)),
    ]


def sample_gradients(model: Any, batches: list[Tensor]) -> list[dict[Tensor, Tensor]]:
    weights = [weight for name, weight in model.named_parameters() if "proj.weight" in name]
    gradients = []
    for sample in torch.cat(batches).split(1):
        loss = model(sample, labels=sample).loss
        gradients.append(dict(zip(weights, torch.autograd.grad(loss, weights), strict=True)))
    return gradients


def score_by_hand(
    model: Any, accumulations: list[list[Tensor]], criterion: str, reduction: str = "sum"
) -> dict[BlockKey, Tensor]:
    gradients = [sample_gradients(model, batches) for batches in accumulations]
    scores = {}
    for block in find_blocks(model):
        values = []
        for unit in range(block.units):
            parts = []
            for weight, index in pick_members(model, block.key, unit):
                contribution = torch.zeros(())
                for samples in gradients:
                    own = torch.stack([sample[weight][index] for sample in samples])
                    contribution = contribution + FORMULAS[criterion](weight[index], own.sum(0), own.square().sum(0))
                parts.append(contribution)
            values.append(REDUCTIONS[reduction](parts))
        scores[block.key] = torch.stack(values).detach().double()
    return scores


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("criterion", FORMULAS)
def test_scores_are_those_of_plain_autograd(criterion: str, accumulate: int) -> None:
    model = make_model("qwen2")
    windows = [BATCHES[start : start + accumulate] for start in range(0, 3, accumulate)]
    expected = score_by_hand(model, windows, criterion)
    scores = score_units(model, find_blocks(model), CalibrationSet(BATCHES, accumulation=accumulate), criterion)
    for key, score in scores.items():
        torch.testing.assert_close(score, expected[key], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_reduction_combines_a_units_projections(reduction: str) -> None:
    model = make_model("llama")
    expected = score_by_hand(model, [BATCHES], "param_first", reduction)
    options = ScoringConfig(reduction=reduction)
    scores = score_units(
        model, find_blocks(model), CalibrationSet(BATCHES, accumulation=3), "param_first", scoring=options
    )
    for key, score in scores.items():
        torch.testing.assert_close(score, expected[key], rtol=1e-4, atol=0)


def test_longer_accumulations_let_samples_cancel_except_in_squares() -> None:
    model = make_model("llama")
    blocks = find_blocks(model)
    for criterion in FORMULAS:
        short, long = (
            score_units(model, blocks, CalibrationSet(BATCHES, accumulation=accumulate), criterion)
            for accumulate in (1, 3)
        )
        for key, score in short.items():
            if criterion == "param_second":
                torch.testing.assert_close(long[key], score)
            else:
                assert (long[key] < score * (1 + 1e-6)).all() or criterion == "param_mix"
                assert not torch.allclose(long[key], score, rtol=1e-2)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_vectorized_output_columns_are_the_gates_taylor_term(accumulate: int) -> None:
    model = make_model("mistral")
    blocks = find_blocks(model)
    outputs = [replace(block, inputs=()) for block in blocks]
    taylor = score_units(model, blocks, CalibrationSet(BATCHES, accumulation=accumulate), "taylor")
    vectorized = score_units(model, outputs, CalibrationSet(BATCHES, accumulation=accumulate), "vectorize")
    for key, score in taylor.items():
        torch.testing.assert_close(vectorized[key], score, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("criterion", FORMULAS)
def test_one_gradient_lives_at_a_time_and_windows_hold_no_more_than_they_must(criterion: str) -> None:
    model = make_model("llama")
    kind: Any = CRITERIA[criterion]
    for accumulate in (1, 2):
        calibration = CalibrationSet([batch[:1] for batch in BATCHES[:2]], accumulate)
        scoring = kind(ScoringRun(model, find_blocks(model), calibration), ScoringConfig())
        held = []

        def spy(*arguments: Any, scoring: Any = scoring, held: list[int] = held) -> None:
            assert sum(weight.grad is not None for name, weight in model.named_parameters() if "proj" in name) == 1
            GradientCriterion.add_gradient(scoring, *arguments)
            assert all(weight.grad is None for name, weight in model.named_parameters() if "proj" in name)
            held.append(max((tensor.numel() for tensor in scoring.partial_sums.values()), default=0))

        scoring.add_gradient = spy
        scoring.score()
        largest = {"param_first": 48 * 24, "param_mix": 2 * 48 * 24, "param_second": 20, "vectorize": 20}[criterion]
        assert max(held) == (0 if accumulate == 1 else largest)
        assert held[-1] == 0
