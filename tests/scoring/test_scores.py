"""What holds for every criterion; normalisation and combination; NaN named with its place."""

import re
from typing import Any

import pytest
import torch

from gqaprune.data.calibration import CalibrationSet
from gqaprune.models.architecture import find_blocks
from gqaprune.models.gates import compute_gate_gradients, freeze_parameters
from gqaprune.scoring.criteria import activations
from gqaprune.scoring.criteria.activations import BrainSurgeon
from gqaprune.scoring.criteria.base import ScoringRun
from gqaprune.scoring.criteria.gates import GateFisher
from gqaprune.scoring.scores import (
    CRITERIA,
    ScoringConfig,
    check_finite_scores,
    check_finite_weights,
    needs_data,
    score_units,
)

from flops import count_tokens
from tiny import make_model, make_tokens

BATCHES = [make_tokens(2, seed=seed) for seed in range(3)]


@pytest.mark.parametrize("criterion", CRITERIA)
def test_scores_do_not_depend_on_how_samples_are_batched(criterion: str) -> None:
    model = make_model("qwen2")
    blocks = find_blocks(model)
    whole = score_units(model, blocks, CalibrationSet([torch.cat(BATCHES)], accumulation=1), criterion)
    parts = score_units(model, blocks, CalibrationSet(BATCHES, accumulation=3), criterion)
    for key, score in whole.items():
        torch.testing.assert_close(parts[key], score, rtol=1e-4, atol=1e-9)


def test_every_criterion_scores_every_unit_of_every_family(any_variant: str) -> None:
    model = make_model(any_variant)
    blocks = find_blocks(model)
    for criterion in CRITERIA:
        scores = score_units(model, blocks, CalibrationSet(BATCHES, accumulation=2), criterion)
        assert list(scores) == [block.key for block in blocks], criterion
        for block in blocks:
            score = scores[block.key]
            assert score.shape == (block.units,) and score.dtype == torch.float64, criterion
            assert (score > 0).all() and score.isfinite().all() and not score.requires_grad, criterion
            assert len(score.unique()) == block.units, criterion


@pytest.mark.parametrize("criterion", CRITERIA)
def test_bfloat16_scores_are_those_of_float32_but_for_rounding(criterion: str) -> None:
    model = make_model("llama")
    exact = score_units(model, find_blocks(model), CalibrationSet(BATCHES, accumulation=2), criterion)
    rounded = score_units(model.bfloat16(), find_blocks(model), CalibrationSet(BATCHES, accumulation=2), criterion)
    for key, score in exact.items():
        assert torch.nn.functional.cosine_similarity(rounded[key], score, dim=0) > 0.97, key


@pytest.mark.parametrize("criterion", CRITERIA)
def test_scoring_leaves_the_model_as_it_was(criterion: str) -> None:
    model = make_model("llama").train()
    frozen, trained = model.model.layers[0].mlp.up_proj.weight, model.model.layers[1].mlp.up_proj.weight
    frozen.requires_grad_(False)
    gradient = trained.grad = torch.ones_like(trained)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    score_units(model, find_blocks(model), CalibrationSet(BATCHES, accumulation=2), criterion)
    assert model.training and all(module.training for module in model.modules())
    assert [parameter for parameter in model.parameters() if not parameter.requires_grad] == [frozen]
    assert [parameter for parameter in model.parameters() if parameter.grad is not None] == [trained]
    assert trained.grad is gradient and (gradient == 1).all()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    assert not any(parameter._post_accumulate_grad_hooks for parameter in model.parameters())


@pytest.mark.parametrize(("normalization", "statistic"), [("mean", "mean"), ("sum", "sum"), ("max", "amax")])
def test_normalization_divides_each_block_by_its_own(normalization: str, statistic: str) -> None:
    model = make_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.zero_()  # no score at all
    blocks = find_blocks(model)
    plain = score_units(model, blocks, BATCHES, "fisher")
    for key, score in score_units(
        model, blocks, BATCHES, "fisher", scoring=ScoringConfig(normalization=normalization)
    ).items():
        if key == (1, "mlp"):
            assert (score == 0).all()
        else:
            assert getattr(score, statistic)().item() == pytest.approx(1)
            torch.testing.assert_close(score * getattr(plain[key], statistic)(), plain[key])


def test_combination_is_the_geometric_mean_of_normalized_scores() -> None:
    model = make_model("llama")
    blocks = find_blocks(model)
    first, second = (score_units(model, blocks, BATCHES, name) for name in ("fisher", "obs"))
    plain = score_units(model, blocks, BATCHES, "fisher+obs")
    options = ScoringConfig(normalization="mean")
    shares = score_units(model, blocks, BATCHES, "fisher+obs", scoring=options)
    for key, score in first.items():
        torch.testing.assert_close(plain[key], (score * second[key]).sqrt())
        torch.testing.assert_close(
            shares[key], (score / score.mean() * second[key] / second[key].mean()).sqrt(), msg=str(key)
        )


@pytest.mark.parametrize(
    ("criterion", "kept_layers", "passes"),
    [
        ("fisher+obs", 3, [1, 1, 1]),
        ("obs+taylor", 3, [1, 1, 1]),
        ("wanda+obs", 3, [1, 1, 1]),
        ("fisher+obs", 1, [2, 2, 1]),  # whose Gram matrices there is no room for
        ("fisher+obs", 0, [2, 2, 2]),
        ("fisher+wifv", 0, [1, 1, 1]),  # a few numbers for each column
        ("param_first+obs", 3, [2, 2, 2]),
    ],
)
def test_criteria_of_activations_watch_the_pass_of_another_one_as_far_as_there_is_room(
    criterion: str, kept_layers: int, passes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model("llama")
    blocks = find_blocks(model)
    of_layer = sum(8 * block.output.in_features**2 for block in blocks[:2])
    first, second = (score_units(model, blocks, CalibrationSet(BATCHES, 2), name) for name in criterion.split("+"))
    monkeypatch.setattr(activations, "find_room", lambda *_: kept_layers * of_layer)
    with count_tokens(model) as counts:
        scores = score_units(model, blocks, CalibrationSet(BATCHES, 2), criterion)
    assert counts == [count * sum(batch.numel() for batch in BATCHES) for count in passes]
    for key, score in scores.items():
        torch.testing.assert_close(score, (first[key] * second[key]).sqrt(), rtol=1e-6, atol=0)


def test_what_is_watched_has_the_bits_of_a_pass_of_its_own_so_that_a_resumed_run_is_the_same() -> None:
    model, batches = make_model("llama"), [make_tokens(5, 500, seed=seed) for seed in range(2)]  # more than a piece
    run = ScoringRun(model, find_blocks(model), CalibrationSet(batches))
    gates, watching, alone = (make(run, ScoringConfig()) for make in (GateFisher, BrainSurgeon, BrainSurgeon))
    with watching.watch(gates):
        gates.score()
    with count_tokens(model) as counts:
        watched = watching.score()
    assert counts == [0, 0, 0]
    assert all(score.equal(watched[key]) for key, score in alone.score().items())


def test_nobody_watches_a_pass_that_recomputes_activations() -> None:
    model = make_model("llama")
    expected = score_units(model, find_blocks(model), BATCHES, "fisher+obs")
    model.activation_checkpointing_enable()
    for key, score in score_units(model, find_blocks(model), BATCHES, "fisher+obs").items():
        torch.testing.assert_close(score, expected[key], rtol=1e-5, atol=0)


def test_activations_of_a_backward_pass_are_left_their_part_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    model, spared = make_model("llama", channels=20, layers=3), []
    monkeypatch.setattr(activations, "find_room", lambda _, bytes_kept: spared.append(bytes_kept) or 0)
    score_units(model, find_blocks(model), [make_tokens(3, 500), make_tokens(3, 600)], "fisher+obs")
    sides = 2 * (24 + 48) + 2 * (24 + 16) + 3 * (24 + 20)  # inputs and outputs of q and o, k and v, the MLP's
    assert spared == [3 * sides * 1000 * 4]  # two windows of 500 tokens at a time


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reduction": "median"}, "reduction must be one of sum, mean, max, prod, got 'median'"),
        ({"normalization": "l2"}, "normalization must be one of none, mean, sum, max, got 'l2'"),
        ({"obs_ridge": 0.0}, "obs_ridge must be above 0 and finite, got 0.0; try 0.1"),
        ({"obs_ridge": float("nan")}, "obs_ridge must be above 0 and finite, got nan"),
    ],
)
def test_settings_out_of_bounds_name_value_and_bound(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ScoringConfig(**options)


def test_unknown_criterion_is_refused_with_those_there_are() -> None:
    model = make_model("llama")
    with pytest.raises(ValueError, match="criterion must be one of fisher, taylor, .*random or two .*, got 'magic'"):
        score_units(model, find_blocks(model), BATCHES, "magic")
    for criterion in ("l1+magic", "l1+l2+obs", ""):
        with pytest.raises(ValueError, match=re.escape(f"two of them joined by +, got {criterion!r}")):
            score_units(model, find_blocks(model), BATCHES, criterion)


def test_criterion_without_text_is_refused_unless_it_reads_none() -> None:
    model = make_model("llama")
    for criterion in CRITERIA:
        if needs_data(criterion):
            with pytest.raises(
                ValueError,
                match=f"{criterion} needs at least one .*got none; criteria that need no text: l1, l2, random",
            ):
                score_units(model, find_blocks(model), [], criterion)
        else:
            score_units(model, find_blocks(model), [], criterion)
    assert not needs_data("l1+random")
    assert needs_data("l1+obs")


def test_nan_weight_is_named_with_its_layer() -> None:
    model = make_model("llama")
    model.model.layers[2].mlp.gate_proj.weight.data[3, 3] = float("nan")
    with pytest.raises(ValueError, match=r"weights of layer 2 \(model.layers.2.mlp.gate_proj.weight\) contain NaN"):
        check_finite_weights(model)


def test_nan_score_is_named_with_its_block_and_unit() -> None:
    scores = {block.key: torch.zeros(block.units) for block in find_blocks(make_model("llama"))}
    scores[1, "attention"][1] = float("inf")
    with pytest.raises(ValueError, match="layer 1 attention: 1 of 2 scores are NaN or infinite .first: unit 1"):
        check_finite_scores(scores)


@pytest.mark.parametrize("criterion", ["fisher", "param_first", "param_second"])
def test_float16_overflow_stops_with_the_calibration_batch_and_the_way_out(criterion: str) -> None:
    model = make_model("llama")
    with torch.no_grad():
        model.model.norm.weight.mul_(1e5)
    model.half()
    with pytest.raises(ValueError, match="calibration batch 0 is not finite.*float16.*bfloat16 or float32"):
        score_units(model, find_blocks(model), BATCHES, criterion)


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
