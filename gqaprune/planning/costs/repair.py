"""Costs of cutting with least squares and refinement, layer by layer, and of distillation.

The number of ridges that least squares try depends on the data: 3 to 5 of the default 5, and one more fit on all text
if no refinement follows. `RIDGES` are counted, in `double_flops` only.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from gqaprune.models.architecture import Block
from gqaprune.plan import BlockKey
from gqaprune.planning.costs.base import (
    SINGLE,
    Cost,
    LayerShape,
    ModelShape,
    Text,
    add_costs,
    go_back_through_layer,
    multiply,
    run_attention,
    run_head,
    run_layer,
    run_mlp,
    run_model,
    run_output,
    run_projections,
)
from gqaprune.planning.costs.curves import move_to_host, split_held_out, take_judged
from gqaprune.planning.costs.gram import factorise, multiply_symmetric, solve, sum_cross, sum_gram
from gqaprune.surgery.distillation import PASSES, RANK, STEP_WINDOWS, TOP_K
from gqaprune.surgery.refinement import SHARES, STEP_TOKENS
from gqaprune.surgery.repair_config import RepairConfig

RIDGES = 4
"""Number of ridges that a block is assumed to try, between 3 and 5."""
_ADAM = 7
"""Numbers that a step of Adam reads or writes per parameter: of weight, gradient and two moments."""


@dataclass(frozen=True)
class CutLayer:
    """A layer before and after its cut.

    Args:
        dense: widths before the cut.
        pruned: widths after the cut.
        repairs: kinds of its blocks that are repaired.
    """

    dense: LayerShape
    pruned: LayerShape
    repairs: tuple[str, ...]

    @property
    def is_cut(self) -> bool:
        """Whether the layer loses any unit."""
        return self.dense != self.pruned


def list_cut_layers(
    shape: ModelShape, blocks: Sequence[Block], kept: Mapping[BlockKey, int], config: RepairConfig
) -> list[CutLayer]:
    """List the widths of all layers and the blocks that `apply_plan_with_repair` repairs.

    Args:
        shape: shape of the dense model.
        blocks: all blocks of the model.
        kept: columns of the output projection that each cut block keeps.
        config: settings of repair.
    """
    pruned = shape.cut(dict(kept), blocks)
    cut = [block.key for block in blocks if kept.get(block.key, block.output.in_features) < block.output.in_features]
    repaired = set(cut)
    if cut and config.refits_everywhere:
        repaired = {block.key for block in blocks if block.key >= min(cut)}
    if config.method == "none":
        repaired = set()
    return [
        CutLayer(*widths, tuple(kind for kind in ("attention", "mlp") if BlockKey(index, kind) in repaired))
        for index, widths in enumerate(zip(shape.layers, pruned.layers, strict=True))
    ]


def cost_cut(
    shape: ModelShape,
    text: Text,
    blocks: Sequence[Block],
    kept: Mapping[BlockKey, int],
    config: RepairConfig,
    measures_damage: bool = False,
    ridges: int = RIDGES,
) -> Cost:
    """Cost of `apply_plan_with_repair`: streams, moments, least squares, refinement and, optionally, layers' damage.

    Args:
        shape: shape of the dense model.
        text: calibration text.
        blocks: all blocks of the model.
        kept: columns of the output projection that each cut block keeps.
        config: settings of repair.
        measures_damage: whether each layer's damage is measured as well.
        ridges: ridges that each block tries.
    """
    layers = list_cut_layers(shape, blocks, kept, config)
    repaired = [index for index, layer in enumerate(layers) if layer.repairs]
    fitted, judged = split_held_out(text, config.holdout)
    cost = Cost()
    if measures_damage and repaired:
        cost += cost_layer_damage(shape, layers, take_judged(text, config.holdout))
    for index, layer in enumerate(layers[: max(repaired, default=-1) + 1]):
        follows = config.follows_dense_model and index >= min(repaired)
        cost += cost_streams(shape, text, layer, config, follows, is_last=index == max(repaired))
        for kind in layer.repairs:
            columns = (
                (layer.dense.query, layer.pruned.query)
                if kind == "attention"
                else (layer.dense.channels, layer.pruned.channels)
            )
            refines = config.refines and kind == "mlp"
            if config.refits_weights:
                cost += cost_moments(shape, text, *columns) + cost_least_squares(shape, columns[1], refines, ridges)
            if refines:
                cost += cost_refinement(shape, fitted, judged, columns[1], config.epochs)
    return cost


def cost_streams(
    shape: ModelShape, text: Text, layer: CutLayer, config: RepairConfig, follows_dense: bool, is_last: bool
) -> Cost:
    """Cost of running calibration text through one layer, of the dense model and of the pruned one.

    The text stops at the output of each repaired block. For the MLP, uncut attention is not run again, except for its
    output projection. If refinement has kept the MLP's input, the rest of the layer is run from there.
    """
    cost = _run(shape, text, layer.dense) if follows_dense else Cost()
    is_whole = layer.dense.query == layer.pruned.query
    if "attention" in layer.repairs:
        cost += run_attention(shape, layer.dense, text)
    if "mlp" in layer.repairs:
        run = run_output if is_whole and "attention" in layer.repairs else run_attention
        cost += run(shape, layer.pruned, text) + run_mlp(shape, layer.dense, text)
    if is_last:
        return cost
    if "mlp" in layer.repairs and config.refines:
        return cost + run_mlp(shape, layer.pruned, text)
    return cost + _run(shape, text, layer.pruned)


def _run(shape: ModelShape, text: Text, layer: LayerShape) -> Cost:
    return run_attention(shape, layer, text) + run_mlp(shape, layer, text)


def cost_moments(shape: ModelShape, text: Text, columns: int, kept: int) -> Cost:
    """Cost of `measure_moments` for one block, in float32: residuals, Gram matrix and cross moments."""
    residual = multiply(text, columns - kept, shape.hidden, SINGLE)
    cost = Cost(single_flops=residual.flops, bytes_moved=residual.bytes_moved)
    if shape.itemsize < SINGLE:  # the block's output is computed again, without rounding
        again = multiply(text, columns, shape.hidden, SINGLE)
        cost += Cost(single_flops=again.flops, bytes_moved=again.bytes_moved)
    return cost + sum_gram(kept, text) + sum_cross(kept, shape.hidden, text)


def cost_least_squares(shape: ModelShape, kept: int, spares_held_out: bool, ridges: int = RIDGES) -> Cost:
    """Cost of `refit_block` in float64: a factorisation, a solution and a product for each ridge.

    torch's counter counts none of these.
    """
    fit = factorise(kept) + solve(kept, shape.hidden) + multiply_symmetric(kept, shape.hidden)
    return (ridges + (not spares_held_out)) * fit


def cost_refinement(shape: ModelShape, fitted: Text, judged: Text, channels: int, epochs: int) -> Cost:
    """Cost of `refine_mlp`: forward and backward by weights, and forward on held-out text for each interpolation."""
    parameters = 3 * shape.hidden * channels
    steps = max(1, fitted.tokens // STEP_TOKENS)
    trained = Text(steps, 1, 1)  # calls in which weights are read
    forward = 3 * multiply(trained, shape.hidden, channels, SINGLE, fitted.tokens)
    back = forward + multiply(trained, channels, shape.hidden, SINGLE, fitted.tokens)
    adam = Cost(bytes_moved=float(steps * _ADAM * SINGLE * parameters))
    measured = 3 * multiply(judged, shape.hidden, channels, shape.itemsize)
    return epochs * (forward + back + adam) + (1 + len(SHARES)) * measured


def cost_layer_damage(shape: ModelShape, layers: Sequence[CutLayer], judged: Text) -> Cost:
    """Cost of `LayerDamageMeter`: for each cut layer, a copy of some text runs through all later, dense layers."""
    cost, copies = Cost(), 0
    for index, layer in enumerate(layers):
        cost += (copies + 1) * run_layer(shape, index, judged) + copies * move_to_host(shape, judged, 2)
        if layer.is_cut:
            copies += 1
            cost += _run(shape, judged, layer.pruned) + move_to_host(shape, judged, 1)
    return cost + (copies + 1) * run_head(shape, judged) + copies * move_to_host(shape, judged, 1)


def split_predicted(text: Text, config: RepairConfig) -> tuple[Text, Text]:
    """Split calibration text into windows that distillation trains on and windows it is judged on, one per call."""
    fitted, judged = (replace(part, batch=1) for part in split_held_out(text, config.holdout))
    return fitted.take(max(1, config.distill_tokens // text.window)), judged


def cost_predictions(shape: ModelShape, text: Text, config: RepairConfig) -> Cost:
    """Cost of `record_predictions`: one forward pass of the dense model; its most likely tokens go to the host."""
    trained, judged = split_predicted(text, config)
    tokens = trained.tokens + judged.tokens
    return run_model(shape, trained) + run_model(shape, judged) + Cost(host_bytes=12.0 * TOP_K * tokens)


def cost_distillation(shape: ModelShape, text: Text, config: RepairConfig) -> Cost:
    """Cost of `distill`: training of adapters on all projections, and three forward passes over held-out text.

    Args:
        shape: shape of the pruned model.
        text: calibration text.
        config: settings of repair.
    """
    trained, judged = split_predicted(text, config)
    drawn = min(PASSES * trained.windows, max(STEP_WINDOWS, config.distill_tokens // text.window))
    read = Text(drawn, text.window, 1)
    cost = cost_adapted_step(shape, read, RANK)
    adapters = count_adapters(shape, RANK)
    adam = Cost(bytes_moved=drawn / STEP_WINDOWS * _ADAM * SINGLE * adapters)
    judging = 3 * run_model(shape, judged) + 2 * run_adapters(shape, judged, RANK)
    host = Cost(host_bytes=12.0 * TOP_K * (read.tokens + 3 * judged.tokens))
    return cost + adam + judging + host


def cost_adapted_step(shape: ModelShape, text: Text, rank: int) -> Cost:
    """Cost of a forward pass and a backward pass to low-rank adapters of all projections."""
    forward = run_model(shape, text) + run_adapters(shape, text, rank)
    layers = range(len(shape.layers))
    back = add_costs(go_back_through_layer(shape, index, text) for index in layers) + run_head(shape, text)
    first = shape.layers[0]  # its input, the embedding, needs no gradient
    back += -1 * run_projections(shape, first, text) + -3 * multiply(text, shape.hidden, rank, shape.itemsize)
    return forward + back + 2 * run_adapters(shape, text, rank)


def list_projections(shape: ModelShape, layer: LayerShape) -> list[tuple[int, int]]:
    """List the numbers of inputs and outputs of a layer's projections."""
    hidden = shape.hidden
    attention = [(hidden, layer.query), (hidden, layer.kv), (hidden, layer.kv), (layer.query, hidden)]
    return [*attention, (hidden, layer.channels), (hidden, layer.channels), (layer.channels, hidden)]


def count_adapters(shape: ModelShape, rank: int) -> int:
    """Count the parameters of adapters of all projections."""
    sizes = (size for layer in shape.layers for size in list_projections(shape, layer))
    return rank * sum(inputs + outputs for inputs, outputs in sizes)


def run_adapters(shape: ModelShape, text: Text, rank: int) -> Cost:
    """Cost of adapters of all projections, forward. Their gradients, and those of their inputs, cost as much each."""
    return add_costs(
        multiply(text, inputs, rank, shape.itemsize) + multiply(text, rank, outputs, shape.itemsize)
        for layer in shape.layers
        for inputs, outputs in list_projections(shape, layer)
    )
