"""Describe how rounding to whole units changes a request, and which settings come closer to it."""

import math
from collections.abc import Mapping, Sequence

import torch

from gqaprune.models.architecture import Block
from gqaprune.planning.allocation import ALLOCATIONS, BlockBudget, Budget, Removed
from gqaprune.planning.config import FREE, PruningConfig
from gqaprune.planning.selection import budget_blocks

_NOTABLE = 0.01
"""Smallest difference worth a message, between attention's requested and actual share of the removed parameters."""
_UNITS: Mapping[str, str] = {"group": "GQA group", "query": "query head of every group"}


def describe_rounding(dense_blocks: Sequence[Block], budget: Budget, removed: Removed, config: PruningConfig) -> str:
    """Describe the difference between what was requested and what is removed; empty if it is small.

    Args:
        dense_blocks: blocks that may lose units.
        budget: the request.
        removed: units that each block loses.
        config: the settings that made the request.
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
        return f"rate {budget.rate:g} rounds to nothing: the smallest step is {least}"
    from_attention = sum(removed[block.key] * block.unit_parameters for block in attention)
    return _describe_split(attention, budget, from_attention, total, config)


def _describe_kv_heads(
    attention: Sequence[BlockBudget], budget: Budget, removed: Removed, config: PruningConfig
) -> str:
    wanted, actual = budget.attention_target(), sum(removed[block.key] * block.unit_kv_heads for block in attention)
    if abs(actual - wanted) < 1:
        return ""
    sentence = (
        f"kv_rate {budget.kv_rate:g} was rounded to {actual / budget.kv_heads:.4g}, "
        f"{actual} of {budget.kv_heads} KV heads"
    )
    reachable = min(round(wanted), sum(block.removable_counts()[-1] * block.unit_kv_heads for block in attention))
    if not ALLOCATIONS[config.allocation].gives_equal_counts or reachable == actual:
        return sentence
    return f"{sentence}, the nearest with equal counts in every layer; allocation: global removes {reachable}"


def _describe_split(
    attention: Sequence[BlockBudget], budget: Budget, from_attention: int, total: int, config: PruningConfig
) -> str:
    if config.split is None and config.sees_repair:
        return ""  # no share of attention was requested
    step, share = _sum_step(attention, config), from_attention / total
    requested = budget.attention_share
    if attention and step == 0 and requested is None:
        return f"split {FREE} removes nothing from attention, which has no GQA group to spare: set granularity: query"
    if step == 0 or (from_attention > 0 if requested is None else abs(share - requested) <= _NOTABLE):
        return ""
    every = " of every layer" if ALLOCATIONS[config.allocation].gives_equal_counts else ""
    split = config.split or FREE
    sentence = (
        f"split {split} was rounded to {100 * share:.0f}:{100 - 100 * share:.0f} of attention and MLP, because one "
        f"{_UNITS[config.granularity]}{every} is {step / budget.target:.0%} of the removed parameters"
    )
    clauses = [sentence]
    if from_attention == 0:
        percent, rate = math.ceil(100 * step / budget.target), _round_up(step / budget.base_parameters)
        setting = f"split {percent}:{100 - percent}" if percent <= 100 else f"rate {rate} with split 10:0"
        clauses.append(f"{setting} removes one")
    if every:
        clauses.append("allocation: global can remove single ones")
    return "; ".join(clauses)


def _sum_step(blocks: Sequence[BlockBudget], config: PruningConfig) -> int:
    """Return the smallest number of parameters that blocks of a kind can lose; 0 if they can lose none."""
    counts = [(block.removable_counts(), block.unit_parameters) for block in blocks]
    steps = [removable[1] * size for removable, size in counts if len(removable) > 1]
    if ALLOCATIONS[config.allocation].gives_equal_counts:
        return sum(steps) if len(steps) == len(blocks) else 0
    return min(steps, default=0)


def _round_up(rate: float) -> float:
    return math.ceil(rate * 10_000) / 10_000
