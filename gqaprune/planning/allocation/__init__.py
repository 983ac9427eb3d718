"""Allocation: turns a parameter budget into how many units each block keeps. Pure functions on numbers.

Which units a block keeps follows from its scores (the highest stay); here only counts are chosen.
"""

from collections.abc import Mapping

from gqaprune.planning.allocation.budget import Allocate, AllocationOptions, BlockBudget, Budget, Removed, parse_split
from gqaprune.planning.allocation.greedy import allocate_global
from gqaprune.planning.allocation.optimal import allocate_optimal
from gqaprune.planning.allocation.swaps import refine_by_swaps
from gqaprune.planning.allocation.uniform import allocate_uniform
from gqaprune.planning.allocation.weighted import allocate_inverse, allocate_proportional

ALLOCATIONS: Mapping[str, Allocate] = {
    "uniform": allocate_uniform,
    "global": allocate_global,
    "inverse": allocate_inverse,
    "proportional": allocate_proportional,
    "optimal": allocate_optimal,
}
"""Name -> allocation."""

__all__ = [
    "ALLOCATIONS",
    "AllocationOptions",
    "BlockBudget",
    "Budget",
    "Removed",
    "allocate_global",
    "allocate_inverse",
    "allocate_optimal",
    "allocate_proportional",
    "allocate_uniform",
    "parse_split",
    "refine_by_swaps",
]
