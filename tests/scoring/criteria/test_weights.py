"""Magnitudes against hand-picked weights; fused projections; seeded chance."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from gqaprune.data.calibration import CalibrationSet
from gqaprune.models.architecture import Projection, find_blocks
from gqaprune.scoring.scores import ScoringConfig, score_units

from tiny import make_model


@pytest.mark.parametrize(("criterion", "power"), [("l1", 1), ("l2", 2)])
def test_magnitude_sums_a_units_own_rows_and_columns(criterion: str, power: int) -> None:
    model = make_model("llama-biases")
    scores = score_units(model, find_blocks(model), [], criterion)
    attention, mlp = model.model.layers[2].self_attn, model.model.layers[2].mlp
    group = [
        attention.q_proj.weight[24:],
        attention.k_proj.weight[8:],
        attention.v_proj.weight[8:],
        attention.o_proj.weight[:, 24:],
    ]
    channel = [mlp.gate_proj.weight[7], mlp.up_proj.weight[7], mlp.down_proj.weight[:, 7]]
    for weights, score in ((group, scores[2, "attention"][1]), (channel, scores[2, "mlp"][7])):
        expected = sum(weight.abs().pow(power).sum().item() for weight in weights)
        assert score.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("reduction", "expected"), [("sum", 9), ("mean", 3), ("max", 6), ("prod", 12)])
def test_reduction_combines_members(reduction: str, expected: float) -> None:
    model = make_model("llama", channels=4)
    mlp = model.model.layers[0].mlp
    with torch.no_grad():
        for linear, size in ((mlp.gate_proj, 1), (mlp.up_proj, 2), (mlp.down_proj, 6)):
            linear.weight.fill_(-size / 24)  # 24 elements a member
    scores = score_units(model, find_blocks(model), [], "l1", scoring=ScoringConfig(reduction=reduction))
    torch.testing.assert_close(scores[0, "mlp"], torch.full((4,), expected, dtype=torch.float64))


def test_fused_projection_counts_as_its_parts() -> None:
    model = make_model("llama")
    block = find_blocks(model)[0]
    fused = nn.Linear(24, 48 + 16 + 16, bias=False)
    fused.weight.data = torch.cat([projection.linear.weight for projection in block.inputs])
    fused_block = replace(block, inputs=(Projection(fused, (24, 8, 8)),))
    for reduction in ("sum", "prod"):
        options = ScoringConfig(reduction=reduction)
        parts = score_units(model, [block], [], "l2", scoring=options)
        whole = score_units(model, [fused_block], [], "l2", scoring=options)
        torch.testing.assert_close(whole[block.key], parts[block.key])


def test_random_is_its_seed_alone() -> None:
    model = make_model("llama")
    blocks = find_blocks(model)
    first = score_units(model, blocks, CalibrationSet([], seed=1), "random")
    torch.rand(3)  # the global generator plays no part
    again = score_units(model, blocks, CalibrationSet([], seed=1), "random")
    other = score_units(model, blocks, CalibrationSet([], seed=2), "random")
    for key, score in first.items():
        assert torch.equal(again[key], score) and not torch.equal(other[key], score)
        assert len(set(score.tolist())) == len(score)
    assert not torch.equal(first[0, "mlp"], first[1, "mlp"])
