"""Moments of a block are sums over what it takes and what it lacks of its target, as their formulas say."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from gqaprune.models.architecture import Block, find_blocks
from gqaprune.surgery.block_targets import BlockMoments, measure_moments
from gqaprune.surgery.gram import Memory
from gqaprune.surgery.refinement import TokenPairs
from gqaprune.surgery.streams import BlockActivations

from tiny import make_model

KEPT = torch.arange(0, 20, 2)
REMOVED = torch.arange(1, 20, 2)


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def get_mlp(model: PreTrainedModel) -> Block:
    return find_blocks(model)[1]


def draw(block: Block, is_held_out: bool, has_dense: bool = False) -> BlockActivations:
    """Random activations of 2 samples of 5 tokens."""
    width, channels = block.output.weight.shape
    x_BTC = torch.randn(2, 5, channels, dtype=block.output.weight.dtype)
    input_BTD, before_BTD, dense_BTD = torch.randn(3, 2, 5, width, dtype=x_BTC.dtype)
    return BlockActivations(
        input_BTD, x_BTC, block.output(x_BTC), before_BTD, dense_BTD if has_dense else None, is_held_out
    )


def measure(model: PreTrainedModel, activations: list[BlockActivations], **settings: Any) -> BlockMoments:
    block = get_mlp(model)
    fitted = {"fits_weight": True, "fits_bias": False, "pull": 0.0, "tokens": None} | settings
    return measure_moments(model, block, KEPT, activations, Memory(torch.device("cpu")), **fitted)


def read(moments: BlockMoments) -> tuple[Tensor, Tensor]:
    """Σ x xᵀ and Σ y xᵀ of what is fitted on; the former's lower triangle is right."""
    return torch.cat(moments.fit.gram.panels).tril(), torch.cat(moments.fit.cross)


def lack(block: Block, batch: BlockActivations) -> Tensor:
    """What the removed columns gave."""
    return batch.x_BTC.flatten(0, 1)[:, REMOVED].float() @ block.output.weight[:, REMOVED].float().T


@pytest.mark.parametrize("variant", ["llama", "gemma2"])
@pytest.mark.parametrize(("fits_weight", "fits_bias"), [(True, False), (True, True), (False, True)])
def test_inputs_are_those_that_are_fitted(variant: str, fits_weight: bool, fits_bias: bool) -> None:
    model = make_model(variant)
    block = get_mlp(model)
    batch = draw(block, is_held_out=False)
    lacking_ND = lack(block, batch)
    target_ND = batch.output_BTD.flatten(0, 1).clone()
    columns = [batch.x_BTC.flatten(0, 1)[:, KEPT]] if fits_weight else []
    x_NS = torch.cat([*columns, torch.ones(10, int(fits_bias))], 1)
    if variant == "gemma2":  # a norm comes next
        size_N1 = target_ND.norm(dim=1, keepdim=True)
        x_NS, lacking_ND, target_ND = x_NS / size_N1, lacking_ND / size_N1, target_ND / size_N1
    moments = measure(model, [batch], fits_weight=fits_weight, fits_bias=fits_bias)
    gram_SS, cross_DS = read(moments)
    torch.testing.assert_close(gram_SS.float(), (x_NS.T @ x_NS).tril(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(cross_DS.float(), lacking_ND.T @ x_NS, rtol=1e-4, atol=1e-5)
    assert moments.energy == pytest.approx(float(target_ND.square().sum()), rel=1e-5)


@pytest.mark.parametrize("pull", [0.25, 1.0])
def test_the_target_goes_its_share_of_the_way_to_the_dense_hidden_states(pull: float) -> None:
    model = make_model("granite")
    block = get_mlp(model)
    batch = draw(block, is_held_out=False, has_dense=True)
    assert batch.dense_BTD is not None
    after_BTD = batch.before_BTD + 0.6 * batch.output_BTD
    missing_ND = (pull / 0.6 * (batch.dense_BTD - after_BTD)).flatten(0, 1)
    target_ND, lacking_ND = batch.output_BTD.flatten(0, 1) + missing_ND, lack(block, batch) + missing_ND
    moments = measure(model, [batch], pull=pull)
    torch.testing.assert_close(
        read(moments)[1].float(), lacking_ND.T @ batch.x_BTC.flatten(0, 1)[:, KEPT], rtol=1e-4, atol=1e-4
    )
    assert moments.energy == pytest.approx(float(target_ND.square().sum()), rel=1e-5)


def test_targets_of_narrow_models_are_not_rounded() -> None:
    model = make_model("llama-biases").to(torch.bfloat16)
    block = get_mlp(model)
    block.output.bias.normal_()
    batch = draw(block, is_held_out=False)
    exact_ND = batch.x_BTC.flatten(0, 1).double() @ block.output.weight.double().T + block.output.bias.double()
    assert measure(model, [batch]).energy == pytest.approx(float(exact_ND.square().sum()), rel=1e-6)


def test_held_out_batches_are_judged_on_and_not_fitted_on() -> None:
    model = make_model()
    block = get_mlp(model)
    batches = [draw(block, is_held_out) for is_held_out in (False, True, False)]
    energies = [float(batch.output_BTD.square().sum()) for batch in batches]
    moments = measure(model, batches)
    assert (int(moments.fit.gram.tokens), int(moments.held_out.gram.tokens)) == (20, 10)
    assert moments.energy == pytest.approx(energies[1], rel=1e-5)
    alone = measure(model, batches[:1])
    assert alone.held_out is alone.fit and alone.energy == pytest.approx(energies[0], rel=1e-5)


def test_tokens_are_kept_in_order_with_their_targets() -> None:
    model = make_model()
    block = get_mlp(model)
    batches = [draw(block, is_held_out) for is_held_out in (False, True, False)]
    width = block.output.out_features
    tokens = tuple(TokenPairs(torch.empty(count, width), torch.empty(count, width)) for count in (20, 10))
    measure(model, batches, tokens=tokens)
    for pairs, kept in zip(tokens, ([batches[0], batches[2]], [batches[1]]), strict=True):
        assert torch.equal(pairs.x_ND, torch.cat([batch.input_BTD.flatten(0, 1) for batch in kept]))
        assert torch.equal(pairs.y_ND, torch.cat([batch.output_BTD.flatten(0, 1) for batch in kept]))


@pytest.mark.parametrize("is_held_out", [False, True])
def test_what_is_not_finite_is_refused_with_the_block(is_held_out: bool) -> None:
    model = make_model()
    batches = [draw(get_mlp(model), False), draw(get_mlp(model), is_held_out)]
    batches[1].x_BTC[0, 0, 0] = torch.inf
    with pytest.raises(ValueError, match="layer 0 mlp: .*not finite on the calibration text"):
        measure(model, batches)
