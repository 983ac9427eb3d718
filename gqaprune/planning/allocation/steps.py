"""Steps: how much of a budget each of several cuts spends, what is left being scored anew before each.

Counts are of the dense model's units throughout, so that budget, layer limits and width rounding keep their meaning:
units that are gone stand in a block's scores as 0, which makes them the first that any allocation removes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from gqaprune.plan import BlockKey
from gqaprune.planning.allocation import BlockBudget, Budget, Removed, allocate_global


@dataclass(frozen=True)
class Spending:
    """Where a run of several cuts stands.

    Args:
        so_far: units that each block of the dense model has lost.
        in_all: units that each will have lost after the last cut, as the latest scores have it.
    """

    so_far: Removed
    in_all: Removed

    def to_dict(self) -> dict[str, list[list[Any]]]:
        """Plain types, as checkpoints hold them."""
        return {
            name: [[key.layer, key.kind, count] for key, count in counts.items()] for name, counts in vars(self).items()
        }

    @classmethod
    def from_dict(cls, data: dict[str, list[list[Any]]]) -> "Spending":
        """What `to_dict` gave."""
        return cls(**{name: {BlockKey(layer, kind): n for layer, kind, n in counts} for name, counts in data.items()})


def spend_share(
    blocks: Sequence[BlockBudget],
    budget: Budget,
    allocate: Callable[[Sequence[BlockBudget], Budget], Removed],
    share: float,
    last: Spending | None = None,
    allocate_part: Callable[[Sequence[BlockBudget], Budget], Removed] = allocate_global,
) -> Spending:
    """Choose what is gone once a share of the budget is spent: of all that the allocation removes, the least important.

    So the allocation's own rules hold in the end, and the whole budget is met as in one cut. Where it would put units
    back, or finds no way on from here, the last step's counts stand: they meet the budget and every limit.

    Args:
        blocks: blocks of the dense model, units that are gone scored 0.
        budget: what has to go from the dense model in all.
        allocate: allocation of the whole budget.
        share: part of what goes in all, over 0 to 1; less than 1 is met from below.
        last: where the cut before left off.
        allocate_part: chooses the least important of what goes in all.

    Raises:
        ValueError: if the budget cannot be met, in the first step only.
    """
    gone = last.so_far if last else {block.key: 0 for block in blocks}
    try:
        in_all = allocate(blocks, budget)
    except ValueError:
        if last is None:
            raise
        in_all = last.in_all
    if last and any(in_all[key] < count for key, count in gone.items()):
        in_all = last.in_all
    if share == 1:
        return Spending(in_all, in_all)
    limited = [replace(block, min_kept=block.units - in_all[block.key]) for block in blocks]
    total = sum(in_all[block.key] * block.unit_parameters for block in blocks)
    part = Budget(share, base_parameters=total, layer_parameters=budget.layer_parameters)
    so_far = allocate_part(limited, part)
    return Spending({key: max(count, gone[key]) for key, count in so_far.items()}, in_all)
