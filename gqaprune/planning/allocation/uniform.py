"""`uniform`: remove equal counts in every layer, so that the checkpoint needs no remote code."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from gqaprune.planning.allocation.budget import (
    DEFAULT_OPTIONS,
    AllocationOptions,
    BlockBudget,
    Budget,
    Removed,
    allocate_or_name_rate,
    find_free_blocks,
    measure_layer_rates,
)
from gqaprune.planning.allocation.greedy import keep_frozen


def allocate_uniform(
    blocks: Sequence[BlockBudget], budget: Budget, options: AllocationOptions = DEFAULT_OPTIONS
) -> Removed:
    """Remove the same number of groups from every attention block, and of channels from every MLP block.

    Attention and MLP lose the same share, or what the budget sets, as closely as whole groups allow; channels make up
    the difference. The budget is met to within half a step; a step is the smallest equal removal in every layer. Layers
    frozen by `frozen_layers` lose nothing. Counts that the budget avoids (`spared_attention`) are used only if no
    others meet it.

    Raises:
        ValueError: if no pair of counts meets the budget, with the nearest reachable rate.
    """
    free = find_free_blocks(blocks, budget, options)
    return keep_frozen(blocks, allocate_or_name_rate(lambda budget: _remove_equal_counts(free, budget), budget))


@dataclass(frozen=True)
class _Option:
    """Equal counts for every layer, and their distance from the target in parameters."""

    groups: int
    channels: int
    parameters: int
    miss: float


def _remove_equal_counts(blocks: Sequence[BlockBudget], budget: Budget) -> Removed:
    attention = [block for block in blocks if block.key.kind == "attention"]
    mlp = [block for block in blocks if block.key.kind == "mlp"]
    group_step, channel_step = _sum_unit_parameters(attention), _sum_unit_parameters(mlp)

    def remove(groups: int, channels: int) -> Removed:
        return {**{block.key: groups for block in attention}, **{block.key: channels for block in mlp}}

    options, channel_counts = [], _common_counts(mlp)
    for groups in _list_group_counts(attention, budget):
        only_attention = budget.kv_rate > 0 and budget.rate == 0
        target = groups * group_step if only_attention else budget.target
        channel_target = (target - groups * group_step) / max(channel_step, 1)
        nearest_first = sorted(channel_counts, key=lambda channels: abs(channels - channel_target))
        allowed = (n for n in nearest_first if not _breaks_layer_rates(blocks, remove(groups, n), budget))
        if (channels := next(allowed, None)) is not None:
            parameters = groups * group_step + channels * channel_step
            options.append(_Option(groups, channels, parameters, abs(parameters - target)))
    if not options:
        raise budget.unreachable(f"no equal counts keep all layers' rates in {budget.min_rate} … {budget.max_rate}")
    finest, finest_step = (mlp, channel_step) if len(channel_counts) > 1 else (attention, group_step)
    step = max((b - a for a, b in pairwise(_common_counts(finest))), default=0) * finest_step
    met = [option for option in options if option.miss <= step / 2]
    if not met:
        nearest = min(options, key=lambda option: option.miss)
        raise budget.unreachable("equal counts in every layer do not come nearer", nearest.parameters)
    stock = [option for option in met if not any(b.units - option.groups in budget.spared_attention for b in attention)]
    best = _choose_split(stock or met, attention, sum(block.units * block.unit_parameters for block in blocks), budget)
    return remove(best.groups, best.channels)


def _list_group_counts(attention: Sequence[BlockBudget], budget: Budget) -> list[int]:
    """List the numbers of groups that every attention block may lose; with a `kv_rate`, only the nearest to it.

    Raises:
        ValueError: if no count meets the KV-cache budget, with the nearest reachable one.
    """
    counts = _common_counts(attention)
    if not budget.kv_rate:
        return counts
    kv_heads, wanted = sum(block.unit_kv_heads for block in attention), budget.attention_target()
    nearest = min(counts[1:], key=lambda groups: abs(groups * kv_heads - wanted), default=0)
    if nearest == 0:
        raise budget.unreachable_kv("no GQA group may go", 0)
    if abs(nearest * kv_heads - wanted) > kv_heads / 2:
        raise budget.unreachable_kv("equal counts in every layer do not come nearer", nearest * kv_heads)
    return [nearest]


def _choose_split(
    options: Sequence[_Option], attention: Sequence[BlockBudget], all_parameters: int, budget: Budget
) -> _Option:
    """Choose the option in which attention's loss is closest to what the budget sets, or to the MLPs' share."""
    if budget.attention_share is None:
        share = budget.target / all_parameters
        units = attention[0].units if attention else 1
        return min(options, key=lambda option: (abs(option.groups / units - share), option.miss))
    group_step, wanted = _sum_unit_parameters(attention), budget.attention_target()
    best = min(options, key=lambda option: (abs(option.groups * group_step - wanted), option.miss))
    can_give = len(_common_counts(attention)) > 1
    if abs(best.groups * group_step - wanted) > group_step * can_give:
        reason = "no equal counts come nearer to" if can_give else "no GQA group may go for"
        raise budget.unreachable(f"{reason} an attention_share of {budget.attention_share}")
    return best


def _common_counts(blocks: Sequence[BlockBudget]) -> list[int]:
    """List the numbers of units that every one of the blocks may lose."""
    if not blocks:
        return [0]
    return sorted(set.intersection(*(set(block.removable_counts()) for block in blocks)))


def _sum_unit_parameters(blocks: Sequence[BlockBudget]) -> int:
    return sum(block.unit_parameters for block in blocks)


def _breaks_layer_rates(blocks: Sequence[BlockBudget], removed: Removed, budget: Budget) -> bool:
    rates = measure_layer_rates(blocks, removed, budget).values()
    return any(not budget.min_rate <= rate <= budget.max_rate for rate in rates)
