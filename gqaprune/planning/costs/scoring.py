"""Costs of perplexity, of the scores of each criterion, of the search for outliers and of the importance of layers."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace

import torch

from gqaprune.models.architecture import Block
from gqaprune.plan import BlockKey
from gqaprune.planning.costs.base import (
    DOUBLE,
    NOTHING,
    SINGLE,
    Cost,
    ModelShape,
    Text,
    add_costs,
    count_predicting,
    go_back_through_block,
    go_back_through_layer,
    multiply,
    run_decoder,
    run_head,
    run_layers,
    run_projections,
)
from gqaprune.planning.costs.gram import factorise, invert_diagonal, sum_gram
from gqaprune.scoring.criteria.base import PIECE_TOKENS
from gqaprune.scoring.outliers import LOOKED_AT
from gqaprune.surgery.gram import count_panel_bytes, find_room


def cost_perplexity(shape: ModelShape, text: Text) -> Cost:
    """Cost of `measure_perplexity`: one forward pass, with the head only on tokens whose next token is known."""
    return run_decoder(shape, text) + run_head(shape, text, count_predicting(text))


def cost_gates(shape: ModelShape, text: Text, blocks: Sequence[Block]) -> Cost:
    """Cost of `fisher` and `taylor`: a forward pass, and a backward pass by inputs to the first gate."""
    text = _cut_pieces(text)
    first = min(block.key for block in blocks)
    head = 2 * run_head(shape, text, count_predicting(text))
    back = [go_back_through_layer(shape, index, text) for index in range(first.layer + 1, len(shape.layers))]
    # Each gate's input is multiplied by its gradient element by element, which only counts as bytes.
    read = sum(text.tokens * block.output.in_features for block in blocks) * 2 * shape.itemsize
    into_block = go_back_through_block(shape, first, text)
    return run_decoder(shape, text) + head + add_costs(back) + into_block + Cost(bytes_moved=float(read))


def _cut_pieces(text: Text) -> Text:
    """Cut text into the pieces that criteria from gates and activations run."""
    return replace(text, batch=min(text.batch, max(1, PIECE_TOKENS // text.window)))


def cost_weight_gradients(shape: ModelShape, text: Text, blocks: Sequence[Block]) -> Cost:
    """Cost of `param_first` and `vectorize`: forward, and backward to all weights of the blocks."""
    first = min(block.key for block in blocks)
    head = 2 * run_head(shape, text, count_predicting(text))
    back = [go_back_through_layer(shape, index, text) for index in range(first.layer + 1, len(shape.layers))]
    linears = {projection.linear for block in blocks for projection in block.inputs} | {b.output for b in blocks}
    widths = [(linear.in_features, linear.out_features) for linear in linears]
    gradients = [multiply(text, *width, shape.itemsize) for width in widths]
    # Each gradient is read and, with its weight, added to scores in float32.
    read = sum(inputs * outputs for inputs, outputs in widths) * text.calls * (2 * shape.itemsize + 4 * SINGLE)
    into_block = _go_back_to_weights(shape, first, text)
    return (
        run_decoder(shape, text)
        + head
        + add_costs(back)
        + into_block
        + add_costs(gradients)
        + Cost(bytes_moved=float(read))
    )


def _cost_gradients_by_sample(shape: ModelShape, text: Text, blocks: Sequence[Block]) -> Cost:
    return cost_weight_gradients(shape, replace(text, batch=1), blocks)


def _go_back_to_weights(shape: ModelShape, first: BlockKey, text: Text) -> Cost:
    """Cost of a backward pass through the first layer whose weights have gradients; its input needs none."""
    layer = shape.layers[first.layer]
    into_output = go_back_through_block(shape, first, text)
    if first.kind == "mlp":
        return into_output
    return go_back_through_layer(shape, first.layer, text) + -1 * run_projections(shape, layer, text)


def cost_activations(shape: ModelShape, text: Text, blocks: Sequence[Block], watched: Collection[int] = ()) -> Cost:
    """Cost of `wanda` and `wifv`, and of the search for outliers: a forward pass to the layer of the last block.

    Args:
        shape: shape of the model.
        text: calibration text.
        blocks: blocks to score.
        watched: layers whose inputs were recorded in another criterion's pass, and are not run again.
    """
    text = _cut_pieces(text)
    last = max((block.key.layer for block in blocks if block.key.layer not in watched), default=-1)
    read = sum(text.tokens * block.output.in_features for block in blocks) * (shape.itemsize + SINGLE)
    return run_layers(shape, range(last + 1), text) + Cost(bytes_moved=float(read))


def cost_brain_surgeon(shape: ModelShape, text: Text, blocks: Sequence[Block], watched: Collection[int] = ()) -> Cost:
    """Cost of `obs`: that of `wanda`, with Gram matrices and the diagonal blocks of their inverses."""
    ratings = [_rate_block(block, _cut_pieces(text)) for block in blocks]
    return cost_activations(shape, text, blocks, watched) + add_costs(ratings)


def _rate_block(block: Block, text: Text) -> Cost:
    size, width, outputs = block.output.in_features, block.columns_per_unit, block.output.out_features
    scores = Cost(
        double_flops=block.units * (width**3 / 3 + 2.0 * width**2 * outputs), bytes_moved=3.0 * DOUBLE * size * outputs
    )
    return sum_gram(size, text) + factorise(size) + invert_diagonal(size, width) + scores


def cost_outliers(shape: ModelShape, text: Text, blocks: Sequence[Block], watched: Collection[int] = ()) -> Cost:
    """Cost of `find_outliers`: a forward pass on the first batches, unless all layers were watched."""
    batches = -(-LOOKED_AT // (text.batch * text.window))
    return cost_activations(shape, text.take(batches * text.batch), blocks, watched)


CRITERIA: Mapping[str, Callable[[ModelShape, Text, Sequence[Block]], Cost]] = {
    "fisher": cost_gates,
    "taylor": cost_gates,
    "param_first": cost_weight_gradients,
    "param_second": _cost_gradients_by_sample,
    "param_mix": _cost_gradients_by_sample,
    "vectorize": cost_weight_gradients,
    "wanda": cost_activations,
    "wifv": cost_activations,
    "obs": cost_brain_surgeon,
}
"""Name -> function of (shape, text, blocks) to a cost. Criteria from weights alone have no products and no entry."""


_FROM_GATES = ("fisher", "taylor")
_FROM_ACTIVATIONS = {"wanda": cost_activations, "wifv": cost_activations, "obs": cost_brain_surgeon}


def cost_scores(
    shape: ModelShape,
    text: Text,
    blocks: Sequence[Block],
    criterion: str,
    finds_outliers: bool = False,
    room: int | None = None,
) -> Cost:
    """Cost of scoring by one criterion or two joined ones, and of the search for outliers in their pass.

    As in `score_units`, activations are watched in another criterion's pass if there is one. The model is assumed to be
    in memory and not to recompute activations; otherwise gates would run tokens twice and could not be watched.

    Args:
        shape: shape of the model.
        text: calibration text.
        blocks: blocks to score.
        criterion: one or two names of `gqaprune.scoring.scores.CRITERIA`.
        finds_outliers: whether outliers are searched.
        room: bytes for Gram matrices that are summed in another criterion's pass; by default those of a CPU. A GPU with
            more free memory has more.
    """
    if not blocks:
        return NOTHING
    cost, can_watch = NOTHING, False
    for name in sorted(dict.fromkeys(criterion.split("+")), key=lambda name: name in _FROM_ACTIVATIONS):
        if name in _FROM_ACTIVATIONS:
            watched = list_watched_layers(blocks, name, room) if can_watch else frozenset()
            cost += _FROM_ACTIVATIONS[name](shape, text, blocks, watched)
        elif name in CRITERIA:
            cost += CRITERIA[name](shape, text, blocks)
        can_watch |= name in _FROM_GATES or name in _FROM_ACTIVATIONS
    if finds_outliers:
        cost += cost_outliers(shape, text, blocks, {block.key.layer for block in blocks} if can_watch else ())
    return cost


def list_watched_layers(blocks: Sequence[Block], criterion: str, room: int | None = None) -> frozenset[int]:
    """List the layers that a criterion from activations watches in another pass: the last ones whose statistics fit.

    Args:
        blocks: blocks to score.
        criterion: a criterion from activations.
        room: bytes for Gram matrices, as in `cost_scores`.
    """
    layers = sorted({block.key.layer for block in blocks}, reverse=True)
    if criterion != "obs":  # only obs has statistics as large as matrices
        return frozenset(layers)
    left = find_room(torch.device("cpu")) if room is None else room
    watched = []
    for layer in layers:
        left -= sum(count_panel_bytes(block.output.in_features) for block in blocks if block.key.layer == layer)
        if left < 0:
            break
        watched.append(layer)
    return frozenset(watched)


def cost_importance(shape: ModelShape, text: Text, blocks: Sequence[Block], method: str) -> Cost:
    """Cost of a measure in `SENSITIVITIES`: one pass, and for removals one from each layer or block to the end."""
    layers = range(len(shape.layers))
    if method not in ("removal", "block_removal"):
        return run_decoder(shape, text)
    head = run_head(shape, text, count_predicting(text))
    if method == "removal":
        starts = [index + 1 for index in sorted({block.key.layer for block in blocks})]
    else:
        starts = [block.key.layer for block in blocks]
    # The dense model's loss only needs the head on its last hidden states.
    after = [run_layers(shape, layers[start:], text) + head for start in starts]
    return run_decoder(shape, text) + head + add_costs(after)
