"""The interface of an allocation: its function, and what it needs besides scores."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from gqaprune.planning.allocation.budget import DEFAULT_OPTIONS, AllocationOptions, BlockBudget, Budget, Removed


class Allocate(Protocol):
    """The function of an allocation."""

    def __call__(self, blocks: Sequence[BlockBudget], budget: Budget, options: AllocationOptions = ..., /) -> Removed:
        """Choose how many units each block loses; raise ValueError if the budget cannot be met."""


@dataclass(frozen=True)
class Allocation:
    """An entry of `ALLOCATIONS`; calling it calls its function.

    Args:
        allocate: the function.
        summary: how it spreads the budget, in a few words for help texts.
        uses_importance: whether it needs the importance of each block, which is measured with the whole model.
        uses_damage_curves: whether it uses the measured damage of each block.
        gives_equal_counts: whether all blocks of a kind lose equally many units, so that a stock class can hold the
            model.
    """

    allocate: Allocate
    summary: str
    uses_importance: bool = False
    uses_damage_curves: bool = False
    gives_equal_counts: bool = False

    @property
    def goes_by_layer(self) -> bool:
        """Whether it works with one decoder layer in memory at a time."""
        return not self.uses_importance

    def __call__(
        self, blocks: Sequence[BlockBudget], budget: Budget, options: AllocationOptions = DEFAULT_OPTIONS
    ) -> Removed:
        """Choose how many units each block loses.

        Raises:
            ValueError: if the budget cannot be met.
        """
        return self.allocate(blocks, budget, options)
