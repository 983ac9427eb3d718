"""Costs of measuring damage curves, after repair or with gates alone."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from gqaprune.models.architecture import Block
from gqaprune.plan import BlockKey
from gqaprune.planning.costs.base import (
    Cost,
    ModelShape,
    Text,
    add_costs,
    multiply,
    run_head,
    run_layer,
    run_layers,
    run_model,
)
from gqaprune.planning.costs.gram import (
    factorise,
    invert,
    multiply_double,
    multiply_symmetric,
    solve,
    solve_small,
    sum_gram,
)
from gqaprune.scoring.repaired_damage import FITTED_TOKENS, JUDGED_PIECE, JUDGED_SHARE, JUDGED_TOKENS
from gqaprune.surgery.repair import choose_held_out

Levels = Mapping[BlockKey, Sequence[int]]
"""For each block, the numbers of units removed from each group at which its damage is measured."""


def split_held_out(text: Text, share: float) -> tuple[Text, Text]:
    """Split calibration text into text to fit on and held-out text; for a single batch both are the same."""
    held = len(choose_held_out(text.calls, share)) * text.batch
    return (text.take(text.windows - held), text.take(held)) if held else (text, text)


def take_tokens(text: Text, most: int) -> Text:
    """Take as many batches as have at most `most` tokens together, at least one."""
    return text.take(max(1, most // (text.batch * text.window)) * text.batch)


def take_judged(text: Text, share: float) -> Text:
    """Take what `choose_judged` takes from calibration text of which a share is held out."""
    _, held = split_held_out(text, share)
    piece = min(held.batch, max(1, JUDGED_PIECE // text.window))
    return take_tokens(replace(held, batch=piece), min(JUDGED_TOKENS, int(JUDGED_SHARE * text.tokens)))


def cost_repaired_damage(
    shape: ModelShape, text: Text, blocks: Sequence[Block], levels: Levels, holdout: float, refits: bool = True
) -> Cost:
    """Cost of `measure_repaired_damage`.

    Args:
        shape: shape of the model.
        text: calibration text, of which only a part is read.
        blocks: blocks to measure.
        levels: numbers of removed units of each block.
        holdout: share of the batches that are held out.
        refits: whether the kept columns are refitted by least squares.
    """
    fitted, judged = take_tokens(split_held_out(text, holdout)[0], FITTED_TOKENS), take_judged(text, holdout)
    measured = [block for block in blocks if levels[block.key]]
    last = max((block.key.layer for block in measured), default=-1)
    cost = run_layers(shape, range(last + 1), fitted)
    copies = 0
    for index in range(len(shape.layers)):
        layer = run_layer(shape, index, judged)
        cost += (copies + 1) * layer + copies * move_to_host(shape, judged, 2)
        for block in (block for block in measured if block.key.layer == index):
            count = len(levels[block.key])
            error = multiply(judged, block.output.in_features, block.output.out_features, shape.itemsize)
            cost += sum_gram(block.output.in_features, fitted) + count * (layer + error)
            cost += count * move_to_host(shape, judged, 1)
            copies += count
            if block.key.kind == "attention":
                cost += sum_gram(block.output.in_features, judged) + _remove_one_by_one(block, refits)
            else:
                cost += _remove_weakest(block, levels[block.key], refits)
    return cost + (copies + 1) * run_head(shape, judged) + copies * move_to_host(shape, judged, 1)


def move_to_host(shape: ModelShape, text: Text, times: int) -> Cost:
    """Cost of moving hidden states to the host or back, a number of times."""
    return Cost(host_bytes=float(times * shape.itemsize * text.tokens * shape.hidden))


def _remove_weakest(block: Block, counts: Sequence[int], refits: bool) -> Cost:
    """Cost of `remove_weakest` in float64: one factorisation, and a product and a solution for each count."""
    if not refits:
        return Cost()
    columns, outputs = block.output.in_features, block.output.out_features
    solved = [multiply_symmetric(columns, outputs) + solve(columns - removed, outputs) for removed in counts]
    return factorise(columns) + add_costs(solved)


def _remove_one_by_one(block: Block, refits: bool) -> Cost:
    """Cost of `remove_one_by_one` in float64: each remaining unit is tried before one is removed.

    torch's counter counts the products of this function.
    """
    columns, outputs, width = block.output.in_features, block.output.out_features, block.columns_per_unit
    size = block.units // block.groups
    trials = block.groups * size * (size + 1) // 2
    trial = multiply_double(outputs, columns, columns)
    if refits:
        trial += solve_small(width, columns) + multiply_double(outputs, width, columns)
    removal = multiply_double(outputs, columns, columns)
    if refits:
        removal += solve_small(width, columns) + multiply_double(columns, width, columns)
    return trials * trial + block.units * removal + (invert(columns) if refits else Cost())


def cost_gated_damage(shape: ModelShape, text: Text, levels: Levels) -> Cost:
    """Cost of `measure_damage_curves`: two passes, and one from the block's layer to the end for each level."""
    layers = range(len(shape.layers))
    head = run_head(shape, text)
    after = [
        len(counts) * (run_layers(shape, layers[key.layer :], text) + head) for key, counts in levels.items() if counts
    ]
    return 2 * run_model(shape, text) + -1 * head + add_costs(after)
