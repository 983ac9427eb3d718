"""What whole units make of a request: a sentence where it is not what was asked, with what comes nearer."""

import math
from collections.abc import Mapping, Sequence

import torch

from gqaprune.models.architecture import Block
from gqaprune.planning.allocation import ALLOCATIONS, BlockBudget, Budget, Removed
from gqaprune.planning.config import FREE, PruningConfig
from gqaprune.planning.selection import budget_blocks

_NOTABLE = 0.01
"""Difference between the share that attention was asked for and the one that it gives, of what goes in all."""
_UNITS: Mapping[str, str] = {"group": "GQA group", "query": "query head of every group"}


def describe_rounding(dense_blocks: Sequence[Block], budget: Budget, removed: Removed, config: PruningConfig) -> str:
    """Compare what goes with what was asked for; empty where whole units come near enough.

    Args:
        dense_blocks: blocks that may lose units.
        budget: what was asked for.
        removed: units that each block loses.
        config: how it was asked for.
    """
    scores = {block.key: torch.zeros(block.units) for block in dense_blocks}
    blocks = budget_blocks(dense_blocks, scores, config)
    total = sum(removed[block.key] * block.unit_parameters for block in blocks)
    attention = [block for block in blocks if block.key.kind == "attention"]
    if budget.kv_rate:
        return _describe_kv_heads(attention, budget, removed, config)
    if total == 0:
        steps = [
            _sum_step([block for block in blocks if block.key.kind == kind], config) for kind in ("attention", "mlp")
        ]
        least = _round_up(min(filter(None, steps)) / budget.base_parameters)
        return f"rate {budget.rate:g} rounds to nothing: the least step is {least}"
    given = sum(removed[block.key] * block.unit_parameters for block in attention)
    return _describe_split(attention, budget, given, total, config)


def _describe_kv_heads(
    attention: Sequence[BlockBudget], budget: Budget, removed: Removed, config: PruningConfig
) -> str:
    wanted, got = budget.attention_target(), sum(removed[block.key] * block.unit_kv_heads for block in attention)
    if abs(got - wanted) < 1:
        return ""
    sentence = f"kv_rate {budget.kv_rate:g} came to {got / budget.kv_heads:.4g}, {got} of {budget.kv_heads} KV heads"
    reachable = min(round(wanted), sum(block.removable_counts()[-1] * block.unit_kv_heads for block in attention))
    if not ALLOCATIONS[config.allocation].gives_equal_counts or reachable == got:
        return sentence
    return f"{sentence}: the nearest with equal counts in every layer; allocation: global removes {reachable}"


def _describe_split(
    attention: Sequence[BlockBudget], budget: Budget, given: int, total: int, config: PruningConfig
) -> str:
    if config.split is None and config.sees_repair:
        return ""  # nothing was asked of attention
    step, share = _sum_step(attention, config), given / total
    asked = budget.attention_share
    if attention and step == 0 and asked is None:
        return f"split {FREE} takes nothing from attention, which keeps its last GQA groups: set granularity: query"
    if step == 0 or (given > 0 if asked is None else abs(share - asked) <= _NOTABLE):
        return ""
    every = " of every layer" if ALLOCATIONS[config.allocation].gives_equal_counts else ""
    split = config.split or FREE
    sentence = (
        f"split {split} came to {100 * share:.0f}:{100 - 100 * share:.0f} of attention and MLP: one "
        f"{_UNITS[config.granularity]}{every} is {step / budget.target:.0%} of what goes"
    )
    ways = [sentence]
    if given == 0:
        percent, rate = math.ceil(100 * step / budget.target), _round_up(step / budget.base_parameters)
        setting = f"split {percent}:{100 - percent}" if percent <= 100 else f"rate {rate} with split 10:0"
        ways.append(f"{setting} takes one")
    if every:
        ways.append("allocation: global takes single ones")
    return "; ".join(ways)


def _sum_step(blocks: Sequence[BlockBudget], config: PruningConfig) -> int:
    """The fewest parameters above 0 that blocks of a kind can lose; 0 where they can lose none."""
    counts = [(block.removable_counts(), block.unit_parameters) for block in blocks]
    steps = [removable[1] * size for removable, size in counts if len(removable) > 1]
    if ALLOCATIONS[config.allocation].gives_equal_counts:
        return sum(steps) if len(steps) == len(blocks) else 0
    return min(steps, default=0)


def _round_up(rate: float) -> float:
    return math.ceil(rate * 10_000) / 10_000
