"""Allocation: turns a parameter budget into how many units each block keeps. Pure functions on numbers.

Which units a block keeps follows from its scores (the highest stay); here only counts are chosen. Counts move in
steps: one unit, or as many channels as bring the width to the next multiple of `channel_multiple`.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from gqaprune.architecture import BlockKey


@dataclass(frozen=True)
class BlockBudget:
    """What allocation knows of one block.

    Args:
        key: decoder layer and kind.
        scores: score of every unit, ascending.
        unit_parameters: parameters that go with one unit.
        min_kept: units that have to stay.
        multiple: the number of kept units has to be a multiple of it wherever any are removed.
    """

    key: BlockKey
    scores: Sequence[float]
    unit_parameters: int
    min_kept: int = 1
    multiple: int = 1

    @property
    def units(self) -> int:
        """Units of the block before pruning."""
        return len(self.scores)

    def removable_counts(self) -> list[int]:
        """Numbers of units that may go, ascending, 0 first."""
        kept = range(self.units - self.units % self.multiple, 0, -self.multiple)
        return [0, *(self.units - n for n in kept if self.min_kept <= n < self.units)]


@dataclass(frozen=True)
class Budget:
    """How much has to go.

    Args:
        rate: share of parameters to remove, as asked.
        base_parameters: parameters that the rate is a share of.
        layer_parameters: parameters of each decoder layer.
        min_rate: least share of each layer with a removable unit that has to go.
        max_rate: largest share of any layer that may go.
    """

    rate: float
    base_parameters: int
    layer_parameters: Sequence[int]
    min_rate: float = 0.0
    max_rate: float = 1.0

    @property
    def target(self) -> float:
        """Parameters to remove."""
        return self.rate * self.base_parameters

    def unreachable(self, reason: str, nearest: int | None = None) -> ValueError:
        """The error for a budget that the limits cannot meet.

        Args:
            reason: why, in words.
            nearest: the nearest reachable removal in parameters, if there is one.
        """
        way_out = "loosen"
        if nearest is not None:
            # Rounded away from the target asked, so that the rate named is itself reachable.
            scale = 10 ** max(4, len(str(self.base_parameters)))
            rounded = math.floor if nearest < self.target else math.ceil
            rate = rounded(nearest / self.base_parameters * scale) / scale
            way_out = f"the nearest reachable rate is {rate}; change `rate` to it, or loosen"
        return ValueError(
            f"cannot remove {self.rate:.2%} of {self.base_parameters:,} parameters: {reason}; {way_out} min_groups, "
            "min_channels, min_rate, max_rate, attention_layers, mlp_layers or channel_multiple"
        )


Removed = dict[BlockKey, int]
"""Units to remove from each block."""


def allocate_uniform(blocks: Sequence[BlockBudget], budget: Budget) -> Removed:
    """Remove the same number of groups from every attention block, and of channels from every MLP block.

    Attention and MLP lose the same share, as nearly as whole groups allow; channels make up the difference. The budget
    is met within half a step, a step being the smallest removal that is alike in every layer.

    Raises:
        ValueError: if no pair of counts meets the budget, with the nearest reachable rate.
    """
    attention = [block for block in blocks if block.key.kind == "attention"]
    mlp = [block for block in blocks if block.key.kind == "mlp"]
    group_step, channel_step = _sum_unit_parameters(attention), _sum_unit_parameters(mlp)

    def remove(groups: int, channels: int) -> Removed:
        return {**{block.key: groups for block in attention}, **{block.key: channels for block in mlp}}

    options, channel_counts = [], _common_counts(mlp)
    for groups in _common_counts(attention):
        channel_target = (budget.target - groups * group_step) / max(channel_step, 1)
        nearest_first = sorted(channel_counts, key=lambda channels: abs(channels - channel_target))
        allowed = (n for n in nearest_first if not _breaks_layer_rates(blocks, remove(groups, n), budget))
        if (channels := next(allowed, None)) is not None:
            parameters = groups * group_step + channels * channel_step
            options.append(_Option(groups, channels, parameters, abs(parameters - budget.target)))
    if not options:
        raise budget.unreachable(f"no equal counts keep all layers' rates in {budget.min_rate} … {budget.max_rate}")
    finest, finest_step = (mlp, channel_step) if len(channel_counts) > 1 else (attention, group_step)
    step = max((b - a for a, b in pairwise(_common_counts(finest))), default=0) * finest_step
    met = [option for option in options if option.miss <= step / 2]
    if not met:
        nearest = min(options, key=lambda option: option.miss)
        raise budget.unreachable("equal counts in every layer do not come nearer", nearest.parameters)
    share = budget.target / sum(block.units * block.unit_parameters for block in blocks)
    units = attention[0].units if attention else 1
    best = min(met, key=lambda option: (abs(option.groups / units - share), option.miss))
    return remove(best.groups, best.channels)


def allocate_global(blocks: Sequence[BlockBudget], budget: Budget) -> Removed:
    """Remove the units with the lowest score per parameter, wherever they are.

    A step goes if it fits into what is left of the budget and of its layer's `max_rate`; `min_rate` is served first.
    The budget is met from below, within the smallest step that is still possible.

    Raises:
        ValueError: if the limits cannot meet the budget, with the nearest reachable rate.
    """
    steps = sorted((step for block in blocks for step in _list_steps(block)), key=lambda step: (step.density, step.key))
    removed: Removed = {block.key: 0 for block in blocks}
    removed_of_layer: dict[int, int] = defaultdict(int)
    total = 0

    def take(step: _Step) -> None:
        nonlocal total
        removed[step.key] = step.removed
        removed_of_layer[step.key.layer] += step.parameters
        total += step.parameters

    def is_next(step: _Step) -> bool:
        return step.removed - step.units == removed[step.key]

    def fits_layer(step: _Step) -> bool:
        limit = budget.max_rate * budget.layer_parameters[step.key.layer]
        return removed_of_layer[step.key.layer] + step.parameters <= limit

    for step in steps:
        least = budget.min_rate * budget.layer_parameters[step.key.layer]
        if removed_of_layer[step.key.layer] < least and is_next(step) and fits_layer(step):
            take(step)
    for layer in sorted({step.key.layer for step in steps}):
        if removed_of_layer[layer] < budget.min_rate * budget.layer_parameters[layer]:
            reached = removed_of_layer[layer] / budget.layer_parameters[layer]
            raise budget.unreachable(
                f"layer {layer} reaches {reached:.2%} at most, min_rate asks {budget.min_rate:.2%}"
            )
    if total > budget.target:
        raise budget.unreachable(f"min_rate {budget.min_rate:.2%} already takes more", total)
    for step in steps:
        if is_next(step) and fits_layer(step) and total + step.parameters <= budget.target:
            take(step)
    still_possible = any(is_next(step) and fits_layer(step) for step in steps)
    if not still_possible and budget.target - total >= min(block.unit_parameters for block in blocks):
        raise budget.unreachable("the limits leave too few units to remove", total)
    return removed


ALLOCATIONS: Mapping[str, Callable[[Sequence[BlockBudget], Budget], Removed]] = {
    "uniform": allocate_uniform,
    "global": allocate_global,
}
"""Name -> allocation."""


@dataclass(frozen=True)
class _Step:
    """Removing the next units of a block: the `units` weakest after which `removed` are gone."""

    key: BlockKey
    units: int
    removed: int
    parameters: int
    density: float


@dataclass(frozen=True)
class _Option:
    """Equal counts for every layer, and by how many parameters they miss the target."""

    groups: int
    channels: int
    parameters: int
    miss: float


def _list_steps(block: BlockBudget) -> list[_Step]:
    counts = block.removable_counts()
    steps: list[_Step] = []
    for before, after in pairwise(counts):
        parameters = (after - before) * block.unit_parameters
        density = sum(block.scores[before:after]) / parameters
        if steps:  # ascending scores make this true but for rounding
            density = max(density, steps[-1].density)
        steps.append(_Step(block.key, after - before, after, parameters, density))
    return steps


def _common_counts(blocks: Sequence[BlockBudget]) -> list[int]:
    """Counts that may go from every one of the blocks."""
    if not blocks:
        return [0]
    return sorted(set.intersection(*(set(block.removable_counts()) for block in blocks)))


def _sum_unit_parameters(blocks: Sequence[BlockBudget]) -> int:
    return sum(block.unit_parameters for block in blocks)


def _breaks_layer_rates(blocks: Sequence[BlockBudget], removed: Removed, budget: Budget) -> bool:
    removed_of_layer: dict[int, int] = defaultdict(int)
    for block in blocks:
        removed_of_layer[block.key.layer] += removed[block.key] * block.unit_parameters
    return any(
        not budget.min_rate <= parameters / budget.layer_parameters[layer] <= budget.max_rate
        for layer, parameters in removed_of_layer.items()
    )
