"""`optimal`: choose the number of removed units of each block that minimises total damage under all limits at once.

This is a mixed-integer linear program, solved exactly by HiGHS through `scipy.optimize.milp`, with one binary variable
for each block and level, and one chosen level per block.
"""

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from gqaprune.plan import BlockKey
from gqaprune.planning.allocation.budget import (
    DEFAULT_OPTIONS,
    AllocationOptions,
    BlockBudget,
    Budget,
    Removed,
    find_free_blocks,
)
from gqaprune.planning.allocation.greedy import Tally, allocate_global, keep_frozen, list_steps

LEVELS = 24
"""Number of levels per block that the program chooses from."""

_SOLVER = {"mip_rel_gap": 1e-6, "node_limit": 20_000}
"""Nodes are limited instead of time, so that the same numbers lead to the same allocation on every machine."""

Curves = Mapping[BlockKey, NDArray[np.float64]]
"""Damage of each block by number of removed units, from 0 to the most that may be removed."""


def allocate_optimal(
    blocks: Sequence[BlockBudget], budget: Budget, options: AllocationOptions = DEFAULT_OPTIONS
) -> Removed:
    """Choose the counts with the least total damage that remove as much as `global` does, within the budget.

    Damage is the sum of the removed units' scores, or interpolated linearly from `options.curves`. The result is exact
    if no block has more than `LEVELS` counts. For larger blocks, the program first chooses among levels over the whole
    range, then among finer ones around the first choice, and the rest of the budget is filled step by step. The result
    is never worse than that of `global`.

    Raises:
        ValueError: if the limits cannot meet the budget, with the nearest reachable rate; or if a curve is missing,
            too short or not finite.
    """
    free = find_free_blocks(blocks, budget, options)
    curves = {block.key: _read_curve(block, options) for block in free}
    best = greedy = allocate_global(free, budget)
    for finer in (False, True):
        solved = _solve(free, budget, curves, greedy, best if finer else None) or greedy
        candidates = [best, _fill_up(free, budget, curves, solved)]
        if _count_parameters(free, solved) >= _count_parameters(free, greedy):
            candidates.append(solved)  # filling up may do more damage than needed
        best = min(candidates, key=lambda removed: _sum_damage(curves, removed))
    return keep_frozen(blocks, best)


def thin_counts(counts: Sequence[int], most: int) -> list[int]:
    """Select at most `most` of ascending counts, evenly spread, with the first and the last."""
    if len(counts) <= most:
        return list(counts)
    return [counts[round(i * (len(counts) - 1) / (most - 1))] for i in range(most)]


@dataclass(frozen=True)
class _Level:
    """A number of removed units that the program may choose for a block, and its damage."""

    block: int
    key: BlockKey
    removed: int
    parameters: int
    kv_heads: int
    damage: float


def _read_curve(block: BlockBudget, options: AllocationOptions) -> NDArray[np.float64]:
    most = block.removable_counts()[-1]
    if options.curves is None:
        return np.concatenate([[0.0], np.cumsum(block.scores[:most])])
    points = sorted({(0, 0.0), *options.curves.get(block.key, ())})
    removed, damage = zip(*points, strict=True)
    if removed[-1] < most:
        raise ValueError(
            f"the damage curve of {block.key} ends at {removed[-1]} of {most} removable units; measure it to the end"
        )
    if not np.isfinite(damage).all():
        raise ValueError(f"the damage curve of {block.key} contains NaN or infinite values; measure it again")
    return np.asarray(np.interp(np.arange(most + 1), removed, damage), dtype=np.float64)


def _sum_damage(curves: Curves, removed: Removed) -> float:
    return float(sum(curve[removed[key]] for key, curve in curves.items()))


def _count_parameters(blocks: Sequence[BlockBudget], removed: Removed) -> int:
    return sum(removed[block.key] * block.unit_parameters for block in blocks)


def _solve(
    blocks: Sequence[BlockBudget], budget: Budget, curves: Curves, greedy: Removed, around: Removed | None
) -> Removed | None:
    """Solve for the levels with the least damage; return None if the solver finds none within its limit."""
    levels, slack = _list_levels(blocks, budget, curves, greedy, around)
    constraints = _list_constraints(blocks, levels, budget, greedy, slack)
    damages = np.array([level.damage for level in levels])
    result = milp(
        damages / (np.abs(damages).max() or 1.0),
        integrality=np.ones(len(levels)),
        bounds=Bounds(0, 1),
        constraints=constraints,
        options=_SOLVER,
    )
    if result.x is None:
        return None
    # The solver's integers are exact to a tolerance, which large blocks amplify.
    x = np.round(result.x)
    if any((limit.A @ x < limit.lb - 1e-7).any() or (limit.A @ x > limit.ub + 1e-7).any() for limit in constraints):
        return None
    return {level.key: level.removed for level, chosen in zip(levels, x, strict=True) if chosen}


def _list_levels(
    blocks: Sequence[BlockBudget], budget: Budget, curves: Curves, greedy: Removed, around: Removed | None
) -> tuple[list[_Level], int]:
    """List the levels of all blocks, and the parameters that the program may leave for filling up."""
    levels, gaps = [], []
    for index, block in enumerate(blocks):
        counts = block.removable_counts()
        if budget.rate == 0 and block.key.kind == "mlp":
            counts = [0]
        if len(counts) > LEVELS:
            counts, gap = _choose_levels(counts, None if around is None else around[block.key])
            gaps.append(gap * block.unit_parameters)
            counts = sorted({*counts, greedy[block.key]})
        for removed in counts:
            parameters, kv_heads = removed * block.unit_parameters, removed * block.unit_kv_heads
            damage = float(curves[block.key][removed])
            levels.append(_Level(index, block.key, removed, parameters, kv_heads, damage))
    return levels, min(gaps, default=0)


def _choose_levels(counts: Sequence[int], around: int | None) -> tuple[list[int], int]:
    """Choose levels over all counts and finer ones around `around`; also return the finest distance in units."""
    coarse = thin_counts(counts, LEVELS)
    if around is None:
        return coarse, coarse[-1] - coarse[-2]
    at = bisect_left(coarse, around)
    low, high = coarse[max(at - 1, 0)], coarse[min(at + 1, LEVELS - 1)]
    fine = thin_counts([count for count in counts if low <= count <= high], LEVELS)
    return sorted({*coarse, *fine, around}), fine[-1] - fine[-2]


def _list_constraints(
    blocks: Sequence[BlockBudget], levels: Sequence[_Level], budget: Budget, greedy: Removed, slack: int
) -> list[LinearConstraint]:
    """List the constraints: one level per block, the budget, the limits of each layer, and attention's part."""
    unit = min(block.unit_parameters for block in blocks)  # keeps coefficients near 1
    parameters = np.array([level.parameters for level in levels]) / unit
    layers = np.array([level.key.layer for level in levels])

    one_each = csr_array((np.ones(len(levels)), ([level.block for level in levels], np.arange(len(levels)))))
    total = _count_parameters(blocks, greedy)
    constraints = [
        LinearConstraint(one_each, 1, 1),
        LinearConstraint(parameters, (total - slack) / unit, max(math.floor(budget.target), total) / unit),
    ]
    for layer in np.unique(layers):
        of_layer, whole = parameters * (layers == layer), budget.layer_parameters[layer]
        low = math.ceil(budget.min_rate * whole) if of_layer.any() else 0
        constraints.append(LinearConstraint(of_layer, low / unit, math.floor(budget.max_rate * whole) / unit))
    if budget.fixes_attention:
        constraints.append(_limit_attention(blocks, levels, budget, greedy))
    return constraints


def _limit_attention(
    blocks: Sequence[BlockBudget], levels: Sequence[_Level], budget: Budget, greedy: Removed
) -> LinearConstraint:
    """Limit what attention loses to between the budget's target and what `global` reached with whole groups."""

    def count(key: BlockKey, parameters: int, kv_heads: int) -> int:
        return budget.count_attention(parameters, kv_heads) if key.kind == "attention" else 0

    counts = [count(level.key, level.parameters, level.kv_heads) for level in levels]
    reached = sum(
        count(block.key, greedy[block.key] * block.unit_parameters, greedy[block.key] * block.unit_kv_heads)
        for block in blocks
    )
    low, high = sorted((reached, budget.attention_target()))
    unit = max(1, max(counts))
    return LinearConstraint(np.array(counts) / unit, math.ceil(low) / unit, math.floor(high) / unit)


def _fill_up(blocks: Sequence[BlockBudget], budget: Budget, curves: Curves, removed: Removed) -> Removed:
    """Take single steps with the least damage per parameter while they fit the budget."""

    def damage(block: BlockBudget, before: int, after: int) -> float:
        curve = curves[block.key]
        return float(curve[after] - curve[before]) / ((after - before) * block.unit_parameters)

    steps = list_steps(blocks, damage)
    if budget.fixes_attention:
        steps = [step for step in steps if step.key.kind == "mlp"]
    tally = Tally(blocks, budget, removed)
    tally.fill(steps, budget.target)
    return tally.removed
