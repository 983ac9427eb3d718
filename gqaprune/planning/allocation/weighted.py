"""`inverse` and `proportional`: how much a layer loses follows from its importance.

Each block has a weight; at water level c it has lost the share c · weight of its units. The level rises until the
budget is met. A layer at a limit (`max_rate`, units that have to stay) stops there and the level rises further for the
others, so clipping never costs the budget.
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
    """Important layers lose less: weights are `e^(-alpha · z)`, z the importance scaled to 0 … 1.

    The budget is met from below, within the smallest step that is still possible.

    Raises:
        ValueError: if importance is missing or the limits cannot meet the budget, with the nearest reachable rate.
    """
    return _allocate_weighted(blocks, budget, options, "allocation inverse", -1)


def allocate_proportional(
    blocks: Sequence[BlockBudget], budget: Budget, options: AllocationOptions = DEFAULT_OPTIONS
) -> Removed:
    """Important layers lose more: weights are `e^(alpha · z)`, z the importance scaled to 0 … 1.

    The budget is met from below, within the smallest step that is still possible.

    Raises:
        ValueError: if importance is missing or the limits cannot meet the budget, with the nearest reachable rate.
    """
    return _allocate_weighted(blocks, budget, options, "allocation proportional", 1)


def _allocate_weighted(
    blocks: Sequence[BlockBudget], budget: Budget, options: AllocationOptions, name: str, sign: int
) -> Removed:
    scaled = _scale_importance(blocks, options, name)
    free = find_free_blocks(blocks, budget, options)

    def water_level(block: BlockBudget, before: int, after: int) -> float:
        # In the middle of the step, so that whole groups are rounded to the nearest.
        return (before + after) / 2 / block.units / math.exp(sign * options.alpha * scaled[block.key])

    return keep_frozen(blocks, fill_budget(free, list_steps(free, water_level), budget))


def _scale_importance(blocks: Sequence[BlockBudget], options: AllocationOptions, name: str) -> Mapping[BlockKey, float]:
    """Importance scaled to 0 … 1, its unit and its origin gone; all 0 where no block stands out."""
    values = options.read_importance(blocks, name)
    above = [value - min(values) for value in values]
    if options.log:
        mean = sum(above) / len(above) or 1.0
        above = [math.log1p(value / mean) for value in above]
    highest = max(above) or 1.0
    return {block.key: value / highest for block, value in zip(blocks, above, strict=True)}
