"""Costs of damage curves: what removing units of each block costs, measured after repair or by gates alone."""

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
"""Numbers of units that each of a block's groups loses where its damage is measured."""


def split_held_out(text: Text, share: float) -> tuple[Text, Text]:
    """Calibration text to fit on, and what is held out of it; both are the same where there is a single batch."""
    held = len(choose_held_out(text.calls, share)) * text.batch
    return (text.take(text.windows - held), text.take(held)) if held else (text, text)


def take_tokens(text: Text, most: int) -> Text:
    """As many batches as have at most so many tokens, at least one."""
    return text.take(max(1, most // (text.batch * text.window)) * text.batch)


def take_judged(text: Text, share: float) -> Text:
    """What `choose_judged` takes of calibration text, a share of which is held out."""
    _, held = split_held_out(text, share)
    piece = min(held.batch, max(1, JUDGED_PIECE // text.window))
    return take_tokens(replace(held, batch=piece), min(JUDGED_TOKENS, int(JUDGED_SHARE * text.tokens)))


def cost_repaired_damage(
    shape: ModelShape, text: Text, blocks: Sequence[Block], levels: Levels, holdout: float, refits: bool = True
) -> Cost:
    """Cost of `measure_repaired_damage`.

    Args:
        shape: of the model.
        text: calibration text, of which some is read.
        blocks: that are measured.
        levels: of each.
        holdout: share of the batches that are held out.
        refits: whether least squares refit what is kept.
    """
    fitted, judged = take_tokens(split_held_out(text, holdout)[0], FITTED_TOKENS), take_judged(text, holdout)
    measured = [block for block in blocks if levels[block.key]]
    last = max((block.key.layer for block in measured), default=-1)
    cost = run_layers(shape, range(last + 1), fitted)
    copies = 0
    for index in range(len(shape.layers)):
        layer = run_layer(shape, index, judged)
        cost += (copies + 1) * layer + copies * move_to_host(shape, judged, 2)
        own = [block for block in measured if block.key.layer == index]
        for block in own:
            count = len(levels[block.key])
            lost = multiply(judged, block.output.in_features, block.output.out_features, shape.itemsize)
            cost += sum_gram(block.output.in_features, fitted) + count * (layer + lost)
            cost += count * move_to_host(shape, judged, 1)
            copies += count
            if block.key.kind == "attention":
                cost += sum_gram(block.output.in_features, judged) + _remove_one_by_one(block, refits)
            else:
                cost += _remove_weakest(block, levels[block.key], refits)
    return cost + (copies + 1) * run_head(shape, judged) + copies * move_to_host(shape, judged, 1)


def move_to_host(shape: ModelShape, text: Text, times: int) -> Cost:
    """Hidden states that go to the host, or come back, so many times."""
    return Cost(host_bytes=float(times * shape.itemsize * text.tokens * shape.hidden))


def _remove_weakest(block: Block, counts: Sequence[int], refits: bool) -> Cost:
    """Cost of `remove_weakest`: one factor, a product and a solution for each number; float64."""
    if not refits:
        return Cost()
    columns, outputs = block.output.in_features, block.output.out_features
    solved = [multiply_symmetric(columns, outputs) + solve(columns - removed, outputs) for removed in counts]
    return factorise(columns) + add_costs(solved)


def _remove_one_by_one(block: Block, refits: bool) -> Cost:
    """Cost of `remove_one_by_one`: every unit that is left is tried whenever one goes; float64.

    torch's counter sees the products of this one.
    """
    columns, outputs, width = block.output.in_features, block.output.out_features, block.columns_per_unit
    size = block.units // block.groups
    tried = block.groups * size * (size + 1) // 2
    one = multiply_double(outputs, columns, columns)
    if refits:
        one += solve_small(width, columns) + multiply_double(outputs, width, columns)
    gone = multiply_double(outputs, columns, columns)
    if refits:
        gone += solve_small(width, columns) + multiply_double(columns, width, columns)
    return tried * one + block.units * gone + (invert(columns) if refits else Cost())


def cost_gated_damage(shape: ModelShape, text: Text, levels: Levels) -> Cost:
    """Cost of `measure_damage_curves`: two passes, and one from each measured block's layer to the end."""
    layers = range(len(shape.layers))
    head = run_head(shape, text)
    after = [
        len(counts) * (run_layers(shape, layers[key.layer :], text) + head) for key, counts in levels.items() if counts
    ]
    return 2 * run_model(shape, text) + -1 * head + add_costs(after)
