"""Activation criteria against their formulas on inputs captured in whole forward passes."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from gqaprune.models.architecture import Block, find_blocks
from gqaprune.scoring.scores import ScoringConfig, score_units
from gqaprune.surgery import gram

from tiny import make_model, make_tokens

BATCHES = [make_tokens(3, 20, seed=0), make_tokens(2, 30, seed=1), make_tokens(3, 30, seed=2)]


@torch.no_grad()
def capture_input(model: PreTrainedModel, block: Block) -> Tensor:
    """Input of a block's output projection on all tokens, float64 `[tokens, columns]`."""
    inputs: list[Tensor] = []
    handle = block.output.register_forward_hook(lambda _, x, y: inputs.append(x[0].flatten(0, 1)))
    for batch in BATCHES:
        model(batch)
    handle.remove()
    return torch.cat(inputs).double()


def unit_columns(block: Block, unit: int) -> slice:
    return slice(unit * block.columns_per_unit, (unit + 1) * block.columns_per_unit)


def test_wanda_is_input_norms_times_weights() -> None:
    model = make_model("qwen2")
    for key, score in score_units(model, find_blocks(model), BATCHES, "wanda").items():
        block = next(block for block in find_blocks(model) if block.key == key)
        each = capture_input(model, block).norm(dim=0) * block.output.weight.detach().double().abs()
        expected = torch.stack([each[:, unit_columns(block, unit)].sum() for unit in range(block.units)])
        torch.testing.assert_close(score, expected, rtol=1e-5, atol=0)


def test_wifv_is_input_variance_times_squared_column_norms() -> None:
    model = make_model("llama-biases")
    for key, score in score_units(model, find_blocks(model), BATCHES, "wifv").items():
        block = next(block for block in find_blocks(model) if block.key == key)
        each = capture_input(model, block).var(dim=0) * block.output.weight.detach().double().square().sum(0)
        expected = torch.stack([each[unit_columns(block, unit)].sum() for unit in range(block.units)])
        torch.testing.assert_close(score, expected, rtol=1e-5, atol=0)


def test_a_constant_channel_is_nothing_to_wifv_and_much_to_wanda() -> None:
    model = make_model("llama-biases")
    mlp = model.model.layers[0].mlp
    with torch.no_grad():
        for linear in (mlp.gate_proj, mlp.up_proj):
            linear.weight[4] = 0
            linear.bias[4] = 3
    variance, norm = (score_units(model, find_blocks(model), BATCHES, name)[0, "mlp"] for name in ("wifv", "wanda"))
    assert variance[4] < 1e-9 < variance[variance.argsort()[1]]
    assert norm.argmax() == 4


@pytest.mark.parametrize("workspace", [2**29, 8 * 8 * 7 * 20], ids=["one panel", "some panels"])
@pytest.mark.parametrize(("ridge", "tolerance"), [(1e-7, 1e-3), (0.1, 1e-5)])
def test_obs_is_the_error_that_refitting_the_other_units_leaves(
    ridge: float, tolerance: float, workspace: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gram, "WORKSPACE", workspace)
    model = make_model("qwen3")
    scores = score_units(model, find_blocks(model), BATCHES, "obs", scoring=ScoringConfig(obs_ridge=ridge))
    for block in find_blocks(model):
        x_NC = capture_input(model, block)
        columns = x_NC.shape[1]
        penalty = ridge * x_NC.square().sum(0).mean()
        # The ridge is a penalty on moving a weight: as many more tokens, one for each column.
        x_NC = torch.cat([x_NC, penalty.sqrt() * torch.eye(columns, dtype=torch.float64)])
        weight_OC = block.output.weight.detach().double()
        for unit in range(block.units):
            removed = torch.zeros(columns, dtype=torch.bool)
            removed[unit_columns(block, unit)] = True
            lost_NO = x_NC[:, removed] @ weight_OC[:, removed].T
            refit = torch.linalg.lstsq(x_NC[:, ~removed], lost_NO).solution
            error = (lost_NO - x_NC[:, ~removed] @ refit).square().sum() / (len(x_NC) - columns) / 2
            torch.testing.assert_close(scores[block.key][unit], error, rtol=tolerance, atol=0)


def test_obs_spares_no_channel_that_others_can_stand_in_for() -> None:
    model = make_model("llama")
    mlp = model.model.layers[1].mlp
    with torch.no_grad():
        for linear in (mlp.gate_proj, mlp.up_proj):
            linear.weight[3] = linear.weight[11]
        mlp.down_proj.weight[:, [3, 11]] *= 10
    twins = score_units(model, find_blocks(model), BATCHES, "obs", scoring=ScoringConfig(obs_ridge=1e-6))[1, "mlp"]
    assert sorted(twins.argsort()[:2].tolist()) == [3, 11]
    wanda = score_units(model, find_blocks(model), BATCHES, "wanda")[1, "mlp"]
    assert sorted(wanda.argsort()[-2:].tolist()) == [3, 11]


def test_obs_of_a_block_that_is_always_off_is_zero() -> None:
    model = make_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.zero_()
    scores = score_units(model, find_blocks(model), BATCHES, "obs")
    assert not scores[1, "mlp"].any() and scores[2, "mlp"].all()


def test_blocks_need_not_be_groups_of_kv_heads_nor_cover_the_model() -> None:
    model = make_model("llama")
    block = find_blocks(model)[2]
    heads = replace(block, units=6, inputs=(replace(block.inputs[0], rows_per_unit=(8,)),), columns_per_unit=8)
    for criterion in ("wanda", "wifv", "l1", "param_first"):
        by_head = score_units(model, [heads], BATCHES, criterion)
        only_query = replace(block, inputs=block.inputs[:1])
        by_group = score_units(model, [only_query], BATCHES, criterion)
        assert list(by_head) == [block.key]
        torch.testing.assert_close(by_head[block.key].view(2, 3).sum(1), by_group[block.key])


@pytest.mark.parametrize("criterion", ["wanda", "wifv", "obs"])
def test_activations_that_overflow_are_named_with_their_block(criterion: str) -> None:
    model = make_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[5] = 3e38
    with pytest.raises(ValueError, match="layer 1 mlp: the input of its output projection is not finite.*bfloat16"):
        score_units(model, find_blocks(model), BATCHES, criterion)


@pytest.mark.parametrize("workspace", [2**29, 2048], ids=["one panel", "some panels"])
def test_unsolvable_least_squares_name_block_and_ridge(workspace: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gram, "WORKSPACE", workspace)
    model = make_model("llama")
    batches = [make_tokens(1, 5)]  # 5 tokens for 48 columns
    with pytest.raises(
        ValueError, match="layer 0 attention: .*no solution with scoring.obs_ridge 1e-30; set it to 0.1"
    ):
        score_units(model, find_blocks(model), batches, "obs", scoring=ScoringConfig(obs_ridge=1e-30))
    score_units(model, find_blocks(model), batches, "obs")
