"""`inverse` and `proportional`: the share that a layer loses depends on its importance.

Each block has a weight and loses the share c · weight of its units, where c grows from 0 until the budget is met. A
layer at a limit (`max_rate`, or units to keep) loses no more while c grows for the others, so the budget is still met.
"""

import math
from collections.abc import Mapping, Sequence

from gqaprune.plan import BlockKey
from gqaprune.planning.allocation.budget import (
    DEFAULT_OPTIONS,
    AllocationOptions,
    BlockBudget,
    Budget,
    Removed,
    find_free_blocks,
)
from gqaprune.planning.allocation.greedy import fill_budget, keep_frozen, list_steps


def allocate_inverse(
    blocks: Sequence[BlockBudget], budget: Budget, options: AllocationOptions = DEFAULT_OPTIONS
) -> Removed:
    """Remove less from important layers: weights are `e^(-alpha · z)`, with z the importance scaled to 0 … 1.

    The budget is met from below, to within the smallest step that is still possible.

    Raises:
        ValueError: if importance is missing or the limits cannot meet the budget, with the nearest reachable rate.
    """
    return _allocate_weighted(blocks, budget, options, "allocation inverse", -1)


def allocate_proportional(
    blocks: Sequence[BlockBudget], budget: Budget, options: AllocationOptions = DEFAULT_OPTIONS
) -> Removed:
    """Remove more from important layers: weights are `e^(alpha · z)`, with z the importance scaled to 0 … 1.

    The budget is met from below, to within the smallest step that is still possible.

    Raises:
        ValueError: if importance is missing or the limits cannot meet the budget, with the nearest reachable rate.
    """
    return _allocate_weighted(blocks, budget, options, "allocation proportional", 1)


def _allocate_weighted(
    blocks: Sequence[BlockBudget], budget: Budget, options: AllocationOptions, name: str, sign: int
) -> Removed:
    scaled = _scale_importance(blocks, options, name)
    free = find_free_blocks(blocks, budget, options)

    def find_multiplier(block: BlockBudget, before: int, after: int) -> float:
        # c in the middle of the step, so that groups are rounded to the nearest number.
        return (before + after) / 2 / block.units / math.exp(sign * options.alpha * scaled[block.key])

    return keep_frozen(blocks, fill_budget(free, list_steps(free, find_multiplier), budget))


def _scale_importance(blocks: Sequence[BlockBudget], options: AllocationOptions, name: str) -> Mapping[BlockKey, float]:
    """Scale importance linearly to 0 … 1; all 0 if all blocks are equally important."""
    values = options.read_importance(blocks, name)
    above = [value - min(values) for value in values]
    if options.log:
        mean = sum(above) / len(above) or 1.0
        above = [math.log1p(value / mean) for value in above]
    highest = max(above) or 1.0
    return {block.key: value / highest for block, value in zip(blocks, above, strict=True)}
