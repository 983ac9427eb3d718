"""Allocations: pure functions that turn a parameter budget into the number of units that each block loses.

Only counts are chosen here; each block keeps the units with the highest scores.
"""

from collections.abc import Mapping

from gqaprune.common.sentences import describe_choices
from gqaprune.planning.allocation.base import Allocation
from gqaprune.planning.allocation.budget import AllocationOptions, BlockBudget, Budget, Removed, parse_split
from gqaprune.planning.allocation.greedy import allocate_global
from gqaprune.planning.allocation.optimal import allocate_optimal
from gqaprune.planning.allocation.swaps import refine_by_swaps
from gqaprune.planning.allocation.uniform import allocate_uniform
from gqaprune.planning.allocation.weighted import allocate_inverse, allocate_proportional

ALLOCATIONS: Mapping[str, Allocation] = {
    "uniform": Allocation(
        allocate_uniform,
        "equal counts in every layer of a range, so that the checkpoint needs no remote code when the ranges cover the "
        "model",
        gives_equal_counts=True,
    ),
    "global": Allocation(allocate_global, "lowest score per parameter anywhere"),
    "inverse": Allocation(allocate_inverse, "important layers lose less", uses_importance=True),
    "proportional": Allocation(allocate_proportional, "important layers lose more", uses_importance=True),
    "optimal": Allocation(allocate_optimal, "least total damage under all limits at once", uses_damage_curves=True),
}
"""Name -> allocation."""


def describe_allocations() -> str:
    """Describe the values of the setting `allocation` for help texts."""
    choices = describe_choices({name: entry.summary for name, entry in ALLOCATIONS.items()})
    return f"how the budget is spread: {choices}."


__all__ = [
    "ALLOCATIONS",
    "Allocation",
    "AllocationOptions",
    "BlockBudget",
    "Budget",
    "Removed",
    "allocate_global",
    "allocate_inverse",
    "allocate_optimal",
    "allocate_proportional",
    "allocate_uniform",
    "describe_allocations",
    "parse_split",
    "refine_by_swaps",
]
