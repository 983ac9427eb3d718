"""Streams: each block is seen with the inputs that the cut layers before it give, and only in the layers' order."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from gqaprune.models.architecture import Block, find_blocks, get_layers, get_module
from gqaprune.surgery.refinement import TokenPairs, reserve_pairs
from gqaprune.surgery.streams import BlockActivations, LayerStreams, Streams

from tiny import make_model, make_tokens

BATCHES = [make_tokens(2, 12, seed=seed) for seed in range(3)]
ARE_HELD_OUT = [False, True, False]


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def make_streams(model: PreTrainedModel, dense_from: int | None = None, last_layer: int = 2) -> Streams:
    return Streams(model, BATCHES, ARE_HELD_OUT, dense_from, last_layer)


@contextmanager
def enter(streams: Streams, model: PreTrainedModel, layer: int) -> Iterator[tuple[LayerStreams, Block, Block]]:
    attention, mlp = find_blocks(model)[2 * layer : 2 * layer + 2]
    with streams.enter_layer(attention, needs_dense_attention=True) as layer_streams:
        yield layer_streams, attention, mlp


def halve(block: Block) -> None:
    """Stand in for a cut and its repair."""
    block.output.weight.mul_(0.5)


def record(model: PreTrainedModel, block: Block) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Input and output of a block's output projection, and what its layer gives, on each batch."""
    calls: list[tuple[Tensor, Tensor]] = []
    hidden_BTD: list[Tensor] = []
    hooks = [
        block.output.register_forward_hook(lambda _, x, y: calls.append((x[0], y))),
        get_layers(model)[block.key.layer].register_forward_hook(lambda _, __, y: hidden_BTD.append(y)),
    ]
    for batch_BT in BATCHES:
        model.model(batch_BT)
    for hook in hooks:
        hook.remove()
    return [(x, y, after) for (x, y), after in zip(calls, hidden_BTD, strict=True)]


def assert_is_seen(model: PreTrainedModel, block: Block, activations: list[BlockActivations]) -> None:
    for (x_BTC, output_BTD, _), one in zip(record(model, block), activations, strict=True):
        torch.testing.assert_close(one.x_BTC, x_BTC)
        torch.testing.assert_close(one.output_BTD, output_BTD)


def test_blocks_are_seen_behind_what_was_cut_before_them() -> None:
    model = make_model()
    streams = make_streams(model)
    for layer in range(3):
        with enter(streams, model, layer) as (layer_streams, *blocks):
            for block in blocks:
                activations = list(layer_streams.run_to(block))
                assert [one.is_held_out for one in activations] == ARE_HELD_OUT
                assert all(one.dense_BTD is None for one in activations)
                assert_is_seen(model, block, activations)
                halve(block)


def test_hidden_states_of_the_dense_model_go_along_from_the_layer_that_is_asked_for() -> None:
    model, dense = make_model(), make_model()
    streams = make_streams(model, dense_from=1)
    for layer in range(3):
        with enter(streams, model, layer) as (layer_streams, attention, mlp):
            (one, *_) = list(layer_streams.run_to(attention))
            assert (one.dense_BTD is None) == (layer < 1)
            if layer == 1:  # nothing was cut yet
                assert torch.equal(one.dense_BTD, one.before_BTD + one.output_BTD)
            activations = list(layer_streams.run_to(mlp))
            if layer >= 1:
                for (_, _, after_BTD), each in zip(
                    record(dense, find_blocks(dense)[2 * layer]), activations, strict=True
                ):
                    torch.testing.assert_close(each.dense_BTD, after_BTD)
                halve(mlp)


def test_whole_attention_is_not_run_again_for_the_mlp_after_it() -> None:
    model = make_model()
    with enter(make_streams(model), model, 0) as (layer_streams, attention, mlp):
        calls: list[None] = []
        handle = attention.inputs[0].linear.register_forward_hook(lambda *_: calls.append(None))
        list(layer_streams.run_to(attention, is_mlp_next=True))
        halve(attention)
        activations = list(layer_streams.run_to(mlp))
        handle.remove()
        assert len(calls) == len(BATCHES)
        assert_is_seen(model, mlp, activations)


def test_a_layer_is_left_from_the_inputs_of_its_mlp_where_they_are_kept() -> None:
    outputs = []
    for keeps in (False, True):
        model = make_model()
        streams = make_streams(model)
        with enter(streams, model, 0) as (layer_streams, _, mlp):
            tokens = reserve_pairs(
                layer_streams.count_tokens(), mlp.inputs[0].linear.in_features, get_module(model, mlp.key)
            )
            fill(tokens, list(layer_streams.run_to(mlp, mlp_tokens=tokens if keeps else None)))
            assert layer_streams.count_tokens() == (48, 24) == tuple(len(pairs.x_ND) for pairs in tokens)
            halve(mlp)
        with enter(streams, model, 1) as (layer_streams, attention, _):
            outputs.append([one.before_BTD for one in layer_streams.run_to(attention)])
    for one, other in zip(*outputs, strict=True):
        torch.testing.assert_close(one, other)


def fill(tokens: tuple[TokenPairs, TokenPairs], activations: list[BlockActivations]) -> None:
    for is_held_out in (False, True):
        inputs = [one.input_BTD.flatten(0, 1) for one in activations if one.is_held_out == is_held_out]
        tokens[is_held_out].x_ND.copy_(torch.cat(inputs))


def test_blocks_can_be_run_to_in_their_layers_order_alone() -> None:
    model = make_model()
    streams = make_streams(model)
    with enter(streams, model, 0) as (first, attention, mlp):
        with pytest.raises(AssertionError, match="cannot run to layer 1 mlp"):
            first.run_to(find_blocks(model)[3])
        list(first.run_to(attention))
        with pytest.raises(AssertionError, match="cannot run to layer 0 attention"):
            first.run_to(attention)
        list(first.run_to(mlp))
        with pytest.raises(AssertionError, match="cannot run to layer 0 attention"):
            first.run_to(attention)
    with pytest.raises(AssertionError, match="cannot run to layer 0 mlp"):
        first.run_to(mlp)


def test_layers_after_the_last_one_are_passed_with_no_streams() -> None:
    model = make_model()
    streams = make_streams(model, dense_from=0, last_layer=0)
    calls: list[None] = []
    with enter(streams, model, 0) as (layer_streams, _, mlp):
        list(layer_streams.run_to(mlp))
        handle = get_layers(model)[0].register_forward_hook(lambda *_: calls.append(None))
    with enter(streams, model, 1) as (layer_streams, attention, _):
        assert layer_streams.count_tokens() == (0, 0)
        assert list(layer_streams.run_to(attention)) == []
    handle.remove()
    assert calls == []


def test_a_layer_that_fails_is_not_run_on() -> None:
    model = make_model()
    calls: list[None] = []
    with pytest.raises(ValueError, match="not finite"), enter(make_streams(model), model, 0):
        get_layers(model)[0].register_forward_hook(lambda *_: calls.append(None))
        raise ValueError("not finite")
    assert calls == []
