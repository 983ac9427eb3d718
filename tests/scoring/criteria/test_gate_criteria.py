"""Gate criteria against their formulas on gradients taken apart."""

import pytest
import torch

import gqaprune.scoring.criteria.base
from gqaprune.data.calibration import CalibrationSet
from gqaprune.models.architecture import find_blocks
from gqaprune.models.gates import compute_gate_gradients, freeze_parameters
from gqaprune.scoring.scores import score_units

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
        scores = score_units(model, find_blocks(model), CalibrationSet(BATCHES, accumulation=accumulate), "fisher")
        for key, score in scores.items():
            torch.testing.assert_close(score, gradients[key].square().sum(0))


def test_taylor_takes_the_absolute_value_of_each_accumulation() -> None:
    model, gradients = stack_gradients()
    scores = score_units(
        model, find_blocks(model), CalibrationSet(BATCHES, accumulation=2), "taylor"
    )  # accumulations: batches 0-1, batch 2
    for key, score in scores.items():
        windows = gradients[key][:4].sum(0).abs() + gradients[key][4:].sum(0).abs()
        torch.testing.assert_close(score, windows)


def test_unit_without_effect_scores_zero() -> None:
    model = make_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[:, 7] = 0
    scores = score_units(model, find_blocks(model), BATCHES, "fisher")
    assert scores[1, "mlp"][7] == 0
    assert (scores[1, "mlp"] > 0).sum() == 19


@pytest.mark.parametrize("criterion", ["fisher", "taylor"])
@pytest.mark.parametrize("tokens, passes", [(1, [1, 1, 1]), (40, [2, 1]), (1024, [3])])
def test_few_samples_are_held_at_a_time_and_score_as_together(
    criterion: str, tokens: int, passes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch, seen = make_model("llama"), make_tokens(3), []
    monkeypatch.setattr(gqaprune.scoring.criteria.base, "PIECE_TOKENS", 3 * 16)
    together = score_units(model, find_blocks(model), [batch], criterion)
    monkeypatch.setattr(gqaprune.scoring.criteria.base, "PIECE_TOKENS", tokens)
    model.model.layers[0].mlp.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    apart = score_units(model, find_blocks(model), [batch], criterion)
    assert seen == passes
    for key, score in together.items():
        torch.testing.assert_close(apart[key], score)


def test_a_model_that_recomputes_its_activations_gets_one_sample_at_a_time() -> None:
    model, batch, seen = make_model("llama"), make_tokens(3), []
    together = score_units(model, find_blocks(model), [batch], "fisher")
    model.model.layers[-1].mlp.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    model.activation_checkpointing_enable()
    apart = score_units(model, find_blocks(model), [batch], "fisher")
    assert set(seen) == {1}
    for key, score in together.items():
        torch.testing.assert_close(apart[key], score)
