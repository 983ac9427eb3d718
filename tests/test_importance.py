"""Criteria against their formulas; batches and windows; NaN named with its place."""

import pytest
import torch

from gqaprune.architecture import find_blocks
from gqaprune.gates import compute_gate_gradients, freeze_parameters
from gqaprune.importance import CRITERIA, check_finite_scores, check_finite_weights, score_units

from tiny import make_model, make_tokens

BATCHES = [make_tokens(2, seed=seed) for seed in range(3)]


def stack_gradients() -> tuple[object, dict[object, torch.Tensor]]:
    model = make_model("llama")
    blocks = find_blocks(model)
    with freeze_parameters(model):
        per_batch = [compute_gate_gradients(model, blocks, batch)[0] for batch in BATCHES]
    return model, {block.key: torch.cat([g[block.key] for g in per_batch]).double() for block in blocks}


def test_fisher_is_the_sum_of_squared_sample_gradients() -> None:
    model, gradients = stack_gradients()
    for accumulate in (1, 2):
        scores = score_units(model, find_blocks(model), BATCHES, "fisher", accumulate)
        for key, score in scores.items():
            torch.testing.assert_close(score, gradients[key].square().sum(0))


def test_taylor_takes_the_absolute_value_of_each_accumulation_window() -> None:
    model, gradients = stack_gradients()
    scores = score_units(model, find_blocks(model), BATCHES, "taylor", accumulate=2)  # windows: batches 0-1, batch 2
    for key, score in scores.items():
        windows = gradients[key][:4].sum(0).abs() + gradients[key][4:].sum(0).abs()
        torch.testing.assert_close(score, windows)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_scores_do_not_depend_on_how_samples_are_batched(criterion: str) -> None:
    model = make_model("qwen2")
    blocks = find_blocks(model)
    whole = score_units(model, blocks, [torch.cat(BATCHES)], criterion, accumulate=1)
    parts = score_units(model, blocks, BATCHES, criterion, accumulate=3)
    for key, score in whole.items():
        torch.testing.assert_close(parts[key], score, rtol=1e-4, atol=1e-9)


def test_query_heads_are_scored_by_the_derivative_of_each_ones_output(variant: str) -> None:
    """Fisher of query heads against weight gradients, sample by sample, and the groups' gradients as their sums."""
    model = make_model(variant, kv_heads=2, ratio=3)
    blocks = [block for block in find_blocks(model, "query") if block.key.kind == "attention"]
    scores = score_units(model, blocks, BATCHES, "fisher")
    expected = {block.key: torch.zeros(6, dtype=torch.float64) for block in blocks}
    for sample in torch.cat(BATCHES):
        model.zero_grad()
        model(sample[None], labels=sample[None]).loss.backward()
        for block in blocks:
            taylor = block.output.weight * block.output.weight.grad
            for head in range(6):
                expected[block.key][head] += taylor[:, head * 8 : head * 8 + 8].sum().double() ** 2
    for key, score in scores.items():
        torch.testing.assert_close(score, expected[key], rtol=1e-3, atol=1e-9)

    with freeze_parameters(model):
        of_heads, _ = compute_gate_gradients(model, blocks, BATCHES[0])
        of_groups, _ = compute_gate_gradients(model, find_blocks(model), BATCHES[0])
    for key, gradient_BU in of_heads.items():
        torch.testing.assert_close(gradient_BU.view(2, 2, 3).sum(2), of_groups[key], rtol=1e-4, atol=1e-6)


def test_unit_without_effect_scores_zero() -> None:
    model = make_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[:, 7] = 0
    scores = score_units(model, find_blocks(model), BATCHES, "fisher")
    assert scores[1, "mlp"][7] == 0
    assert (scores[1, "mlp"] > 0).sum() == 19


def test_scoring_leaves_the_model_as_it_was() -> None:
    model = make_model("llama").train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    score_units(model, find_blocks(model), BATCHES, "fisher")
    assert model.training and all(p.requires_grad and p.grad is None for p in model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_nan_weight_is_named_with_its_layer() -> None:
    model = make_model("llama")
    model.model.layers[2].mlp.gate_proj.weight.data[3, 3] = float("nan")
    with pytest.raises(ValueError, match=r"weights of layer 2 \(model.layers.2.mlp.gate_proj.weight\) hold NaN"):
        check_finite_weights(model)


def test_nan_score_is_named_with_its_block_and_unit() -> None:
    scores = {block.key: torch.zeros(block.units) for block in find_blocks(make_model("llama"))}
    scores[1, "attention"][1] = float("inf")
    with pytest.raises(ValueError, match="layer 1 attention: 1 of 2 scores are NaN or infinite .first: unit 1"):
        check_finite_scores(scores)


def test_float16_overflow_stops_with_the_calibration_batch_and_the_way_out() -> None:
    model = make_model("llama")
    with torch.no_grad():
        model.model.norm.weight.mul_(1e5)
    model.half()
    with pytest.raises(ValueError, match="calibration batch 0 is not finite.*float16.*bfloat16 or float32"):
        score_units(model, find_blocks(model), BATCHES, "fisher")
