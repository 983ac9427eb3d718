"""What an allocation is: its function, and what it looks at besides scores."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from gqaprune.planning.allocation.budget import DEFAULT_OPTIONS, AllocationOptions, BlockBudget, Budget, Removed


class Allocate(Protocol):
    """The function of an allocation."""

    def __call__(self, blocks: Sequence[BlockBudget], budget: Budget, options: AllocationOptions = ..., /) -> Removed:
        """How many units go from each block. Raises ValueError if the budget cannot be met."""


@dataclass(frozen=True)
class Allocation:
    """An allocation, an entry of `ALLOCATIONS`; calling it calls its function.

    Args:
        allocate: says how many units go from each block.
        summary: how it spreads the budget, in a few words, for help texts.
        uses_importance: whether it needs the importance of every block, which is measured on the whole model.
        uses_damage_curves: whether it reads the measured damage of each block where `damage_levels` asks for it.
        gives_equal_counts: whether all blocks of a kind lose as many units, so that a stock class can hold the model.
    """

    allocate: Allocate
    summary: str
    uses_importance: bool = False
    uses_damage_curves: bool = False
    gives_equal_counts: bool = False

    @property
    def goes_by_layer(self) -> bool:
        """Whether it works where one decoder layer is in memory at a time."""
        return not self.uses_importance

    def __call__(
        self, blocks: Sequence[BlockBudget], budget: Budget, options: AllocationOptions = DEFAULT_OPTIONS
    ) -> Removed:
        """How many units go from each block.

        Raises:
            ValueError: if the budget cannot be met.
        """
        return self.allocate(blocks, budget, options)
