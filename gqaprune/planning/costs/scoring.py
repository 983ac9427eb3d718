"""Costs of perplexity, of each criterion's scores, of the search for outliers, and of the importance of layers."""

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
    """Cost of `measure_perplexity`: one forward pass, its head on the tokens that predict another one."""
    return run_decoder(shape, text) + run_head(shape, text, count_predicting(text))


def cost_gates(shape: ModelShape, text: Text, blocks: Sequence[Block]) -> Cost:
    """Cost of `fisher` and `taylor`: forward, and backward by inputs alone to the first gate."""
    text = _cut_pieces(text)
    first = min(block.key for block in blocks)
    head = 2 * run_head(shape, text, count_predicting(text))
    back = [go_back_through_layer(shape, index, text) for index in range(first.layer + 1, len(shape.layers))]
    # The products of each gate's input with its gradient are read once more, and are no product of matrices.
    read = sum(text.tokens * block.output.in_features for block in blocks) * 2 * shape.itemsize
    into_block = go_back_through_block(shape, first, text)
    return run_decoder(shape, text) + head + add_costs(back) + into_block + Cost(bytes_moved=float(read))


def _cut_pieces(text: Text) -> Text:
    """Text in the pieces in which criteria of gates and activations pass it."""
    return replace(text, batch=min(text.batch, max(1, PIECE_TOKENS // text.window)))


def cost_weight_gradients(shape: ModelShape, text: Text, blocks: Sequence[Block]) -> Cost:
    """Cost of `param_first`, `param_second`, `param_mix` and `vectorize`: gradients of all weights of the blocks."""
    first = min(block.key for block in blocks)
    head = 2 * run_head(shape, text, count_predicting(text))
    back = [go_back_through_layer(shape, index, text) for index in range(first.layer + 1, len(shape.layers))]
    linears = {projection.linear for block in blocks for projection in block.inputs} | {b.output for b in blocks}
    widths = [(linear.in_features, linear.out_features) for linear in linears]
    gradients = [multiply(text, *width, shape.itemsize) for width in widths]
    # Each gradient is read and, with the weight, folded into scores in float32.
    folded = sum(inputs * outputs for inputs, outputs in widths) * text.calls * (2 * shape.itemsize + 4 * SINGLE)
    into_block = _go_back_to_weights(shape, first, text)
    return (
        run_decoder(shape, text)
        + head
        + add_costs(back)
        + into_block
        + add_costs(gradients)
        + Cost(bytes_moved=float(folded))
    )


def _cost_gradients_by_sample(shape: ModelShape, text: Text, blocks: Sequence[Block]) -> Cost:
    return cost_weight_gradients(shape, replace(text, batch=1), blocks)


def _go_back_to_weights(shape: ModelShape, first: BlockKey, text: Text) -> Cost:
    """Backward through the first layer of which weights have gradients; what comes before them needs none."""
    layer = shape.layers[first.layer]
    into_output = go_back_through_block(shape, first, text)
    if first.kind == "mlp":
        return into_output
    return go_back_through_layer(shape, first.layer, text) + -1 * run_projections(shape, layer, text)


def cost_activations(shape: ModelShape, text: Text, blocks: Sequence[Block], watched: Collection[int] = ()) -> Cost:
    """Cost of `wanda` and `wifv`, and of the statistics of outliers: forward as far as the last block's layer.

    Args:
        shape: of the model.
        text: calibration text.
        blocks: that are scored.
        watched: layers whose inputs were seen in the pass of another criterion. None is made for them.
    """
    text = _cut_pieces(text)
    last = max((block.key.layer for block in blocks if block.key.layer not in watched), default=-1)
    read = sum(text.tokens * block.output.in_features for block in blocks) * (shape.itemsize + SINGLE)
    return run_layers(shape, range(last + 1), text) + Cost(bytes_moved=float(read))


def cost_brain_surgeon(shape: ModelShape, text: Text, blocks: Sequence[Block], watched: Collection[int] = ()) -> Cost:
    """Cost of `obs`: the same, with Gram matrices, and the diagonal blocks of their inverses."""
    rated = [_rate_block(block, _cut_pieces(text)) for block in blocks]
    return cost_activations(shape, text, blocks, watched) + add_costs(rated)


def _rate_block(block: Block, text: Text) -> Cost:
    size, width, outputs = block.output.in_features, block.columns_per_unit, block.output.out_features
    own = Cost(
        double_flops=block.units * (width**3 / 3 + 2.0 * width**2 * outputs), bytes_moved=3.0 * DOUBLE * size * outputs
    )
    return sum_gram(size, text) + factorise(size) + invert_diagonal(size, width) + own


def cost_outliers(shape: ModelShape, text: Text, blocks: Sequence[Block], watched: Collection[int] = ()) -> Cost:
    """Cost of `find_outliers`: forward on the first batches, unless all layers were watched."""
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
"""Name -> cost of (shape, text, blocks); those that read no text are left out, for weights alone cost no product."""


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
    """Cost of scores, of both criteria where two are joined, and of the search for outliers if it is made beside them.

    As in `score_units`, activations are watched in the pass that another criterion makes. The model is in memory and
    keeps its activations; else gates pass tokens twice, and nothing watches them.

    Args:
        shape: of the model.
        text: calibration text.
        blocks: that are scored.
        criterion: one or two of `gqaprune.scoring.scores.CRITERIA`.
        finds_outliers: whether outliers are looked for.
        room: bytes for Gram matrices that are summed while another criterion passes; those of a CPU by default. A GPU
            with more free memory has more.
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
    """Layers that a criterion of activations watches in another one's pass: the last ones whose statistics fit.

    Args:
        blocks: that are scored.
        criterion: of activations.
        room: bytes for Gram matrices, as in `cost_scores`.
    """
    layers = sorted({block.key.layer for block in blocks}, reverse=True)
    if criterion != "obs":  # whose statistics alone are as large as matrices
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
    # The dense model's loss is measured from its last hidden states.
    after = [run_layers(shape, layers[start:], text) + head for start in starts]
    return run_decoder(shape, text) + head + add_costs(after)
