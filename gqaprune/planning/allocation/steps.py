"""Divide a budget over several cuts, before each of which the remaining units are scored again.

Counts always refer to the units of the dense model, so that budget, layer limits and multiples keep their meaning.
Removed units have the score 0, so every allocation removes them first.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from gqaprune.plan import BlockKey
from gqaprune.planning.allocation import BlockBudget, Budget, Removed, allocate_global


@dataclass(frozen=True)
class Spending:
    """The progress of a run of several cuts.

    Args:
        so_far: units that each block of the dense model has lost.
        in_all: units that each block will have lost after the last cut, by the latest scores.
    """

    so_far: Removed
    in_all: Removed

    def to_dict(self) -> dict[str, list[list[Any]]]:
        """Convert to plain types for checkpoints."""
        return {
            name: [[key.layer, key.kind, count] for key, count in counts.items()] for name, counts in vars(self).items()
        }

    @classmethod
    def from_dict(cls, data: dict[str, list[list[Any]]]) -> "Spending":
        """Build from the output of `to_dict`."""
        return cls(**{name: {BlockKey(layer, kind): n for layer, kind, n in counts} for name, counts in data.items()})


def spend_share(
    blocks: Sequence[BlockBudget],
    budget: Budget,
    allocate: Callable[[Sequence[BlockBudget], Budget], Removed],
    share: float,
    previous: Spending | None = None,
    allocate_part: Callable[[Sequence[BlockBudget], Budget], Removed] = allocate_global,
) -> Spending:
    """Choose what has been removed once a share of the budget is spent: the least important units of the allocation.

    The whole budget is allocated each time, so it is met as in one cut, and the allocation's rules hold in the end. If
    the new allocation would restore removed units, or cannot meet the budget, the previous one is kept, which meets the
    budget and all limits.

    Args:
        blocks: blocks of the dense model, with scores of 0 for removed units.
        budget: what to remove from the dense model in total.
        allocate: allocation of the whole budget.
        share: share of the budget to spend, above 0 and at most 1; below 1 it is met from below.
        previous: result of the previous cut; None for the first.
        allocate_part: allocation that chooses the least important part of what is removed in total.

    Raises:
        ValueError: if the budget cannot be met in the first cut.
    """
    removed = previous.so_far if previous else {block.key: 0 for block in blocks}
    try:
        in_all = allocate(blocks, budget)
    except ValueError:
        if previous is None:
            raise
        in_all = previous.in_all
    if previous and any(in_all[key] < count for key, count in removed.items()):
        in_all = previous.in_all
    if share == 1:
        return Spending(in_all, in_all)
    limited = [replace(block, min_kept=block.units - in_all[block.key]) for block in blocks]
    total = sum(in_all[block.key] * block.unit_parameters for block in blocks)
    part = Budget(share, base_parameters=total, layer_parameters=budget.layer_parameters)
    so_far = allocate_part(limited, part)
    return Spending({key: max(count, removed[key]) for key, count in so_far.items()}, in_all)
