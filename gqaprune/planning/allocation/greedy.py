"""Fill a budget step by step in a given order, within all limits. `global` orders steps by score per parameter.

A step is one unit, or as many channels as it takes to reach the next multiple of `channel_multiple`.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from gqaprune.plan import BlockKey
from gqaprune.planning.allocation.budget import (
    DEFAULT_OPTIONS,
    AllocationOptions,
    BlockBudget,
    Budget,
    Removed,
    allocate_or_name_rate,
    find_free_blocks,
)


def allocate_global(
    blocks: Sequence[BlockBudget], budget: Budget, options: AllocationOptions = DEFAULT_OPTIONS
) -> Removed:
    """Remove the units with the lowest score per parameter, wherever they are.

    Steps are taken if they fit the rest of the budget and the layer's `max_rate`; those that `min_rate` needs come
    first. The budget is met from below, to within the smallest step that is still possible.

    Raises:
        ValueError: if the limits cannot meet the budget, with the nearest reachable rate.
    """

    def average_score(block: BlockBudget, before: int, after: int) -> float:
        return sum(block.scores[before:after]) / ((after - before) * block.unit_parameters)

    free = find_free_blocks(blocks, budget, options)
    return keep_frozen(blocks, fill_budget(free, list_steps(free, average_score), budget))


@dataclass(frozen=True)
class Step:
    """Removal of the next `units` weakest units of a block, after which it has lost `removed`; sorted by `order`."""

    key: BlockKey
    units: int
    removed: int
    parameters: int
    kv_heads: int
    order: float


class Tally:
    """What has been removed so far, within the limits of each layer.

    Args:
        blocks: the blocks.
        budget: the budget.
        removed: units that each block has lost at the start.
    """

    def __init__(self, blocks: Sequence[BlockBudget], budget: Budget, removed: Removed) -> None:
        self.budget = budget
        self.removed = dict(removed)
        self.of_layer: dict[int, int] = defaultdict(int)
        for block in blocks:
            self.of_layer[block.key.layer] += removed[block.key] * block.unit_parameters

    @property
    def total(self) -> int:
        """Number of removed parameters."""
        return sum(self.of_layer.values())

    def can_take(self, step: Step) -> bool:
        """Whether a step is the next one of its block and within its layer's `max_rate`."""
        limit = self.budget.max_rate * self.budget.layer_parameters[step.key.layer]
        is_next = step.removed - step.units == self.removed[step.key]
        return is_next and self.of_layer[step.key.layer] + step.parameters <= limit

    def take(self, step: Step) -> None:
        """Remove a step's units."""
        self.removed[step.key] = step.removed
        self.of_layer[step.key.layer] += step.parameters

    def least(self, layer: int) -> float:
        """Return the number of parameters that a layer has to lose by `min_rate`."""
        return self.budget.min_rate * self.budget.layer_parameters[layer]

    def serve_min_rate(self, steps: Sequence[Step], later: Mapping[int, int] | None = None) -> None:
        """Take steps in layers that are below `min_rate`.

        Args:
            steps: steps in order.
            later: parameters that each layer can lose by steps that follow these.
        """
        spare = later or {}
        for step in steps:
            layer = step.key.layer
            if self.of_layer[layer] + spare.get(layer, 0) < self.least(layer) and self.can_take(step):
                self.take(step)

    def fill(self, steps: Sequence[Step], target: float) -> None:
        """Take every step that fits the target, in order."""
        total = self.total
        for step in steps:
            if self.can_take(step) and total + step.parameters <= target:
                self.take(step)
                total += step.parameters


def list_steps(blocks: Sequence[BlockBudget], order: Callable[[BlockBudget, int, int], float]) -> list[Step]:
    """List all steps of some blocks, in the order in which they are taken.

    Args:
        blocks: the blocks.
        order: maps a block and its removed units before and after a step to the value by which steps are sorted. A
            step is never sorted before an earlier step of its block.
    """
    steps: list[Step] = []
    for block in blocks:
        latest = float("-inf")
        for before, after in pairwise(block.removable_counts()):
            latest = max(latest, order(block, before, after))
            units = after - before
            parameters, kv_heads = units * block.unit_parameters, units * block.unit_kv_heads
            steps.append(Step(block.key, units, after, parameters, kv_heads, latest))
    return sorted(steps, key=lambda step: (step.order, step.key))


def fill_budget(blocks: Sequence[BlockBudget], steps: Sequence[Step], budget: Budget) -> Removed:
    """Take steps in order until the budget is met.

    If the budget sets how much attention loses, attention's steps come first and channels make up the rest.

    Args:
        blocks: the blocks.
        steps: their steps from `list_steps`.
        budget: what to remove.

    Raises:
        ValueError: if the limits cannot meet the budget, with the nearest reachable rate.
    """
    return allocate_or_name_rate(lambda budget: _fill(blocks, steps, budget), budget)


def keep_frozen(blocks: Sequence[BlockBudget], removed: Removed) -> Removed:
    """Add the blocks that an allocation was not given, with 0 removed units."""
    return {block.key: removed.get(block.key, 0) for block in blocks}


def _fill(blocks: Sequence[BlockBudget], steps: Sequence[Step], budget: Budget) -> Removed:
    tally = Tally(blocks, budget, dict.fromkeys((block.key for block in blocks), 0))
    target, layers = budget.target, sorted({step.key.layer for step in steps})
    taken = f"min_rate {budget.min_rate:.2%}"
    if budget.fixes_attention:
        _take_attention(tally, steps, budget)
        steps = [step for step in steps if step.key.kind == "mlp"]
        if budget.kv_rate and budget.rate == 0:
            target = tally.total
        if budget.kv_rate and tally.total > target:
            taken = f"{budget.kv_rate:.2%} less KV cache"
    start = Tally(blocks, budget, tally.removed)
    tally.serve_min_rate(steps)
    if tally.total > target:  # whole groups exceed it; the smallest steps may meet min_rate within the budget
        tally = start
        tally.serve_min_rate(sorted(steps, key=lambda step: step.parameters))
    for layer in layers:
        if tally.of_layer[layer] < tally.least(layer):
            reached = tally.of_layer[layer] / budget.layer_parameters[layer]
            raise budget.unreachable(
                f"layer {layer} can lose {reached:.2%} at most, but min_rate is {budget.min_rate:.2%}"
            )
    if budget.kv_rate and tally.total < target + 1:
        target = max(target, tally.total)  # a suggested rate has few digits, and may be slightly too small
    if tally.total > target:
        raise budget.unreachable(f"{taken} already takes more", tally.total)
    tally.fill(steps, target)
    still_possible = any(tally.can_take(step) for step in steps)
    if not still_possible and target - tally.total >= min(block.unit_parameters for block in blocks):
        raise budget.unreachable("the limits leave too few units to remove", tally.total)
    return tally.removed


def _take_attention(tally: Tally, steps: Sequence[Step], budget: Budget) -> None:
    """Take attention's part of the budget, to the nearest whole group."""
    later: dict[int, int] = defaultdict(int)
    for step in steps:
        if step.key.kind == "mlp":
            later[step.key.layer] += step.parameters
    steps = [step for step in steps if step.key.kind == "attention"]
    sizes = {step.key: budget.count_attention(step.parameters, step.kv_heads) for step in steps}
    wanted = budget.attention_target()
    tally.serve_min_rate(steps, later)
    reached = sum(sizes[step.key] for step in steps if step.removed <= tally.removed[step.key])
    for step in steps:
        fits = budget.kv_rate > 0 or tally.total + step.parameters <= budget.target
        if tally.can_take(step) and fits and sizes[step.key] / 2 <= wanted - reached:
            tally.take(step)
            reached += sizes[step.key]
    size = max(sizes.values(), default=0)
    is_none = budget.kv_rate > 0 and reached == 0
    if abs(wanted - reached) <= size and not is_none:
        return
    reason = "the limits leave too few GQA groups" if reached < wanted else f"min_rate {budget.min_rate:.2%} takes more"
    if not steps:
        reason = "no GQA group may go"
    elif is_none and wanted < size:
        reason, reached = "it rounds to none", size
    if budget.kv_rate:
        raise budget.unreachable_kv(reason, reached)
    raise budget.unreachable(f"{reason} for an attention_share of {budget.attention_share}")
