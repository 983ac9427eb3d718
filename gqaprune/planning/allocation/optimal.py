"""`optimal`: one number of removed units per block, so that the total damage is least under every limit at once.

A mixed-integer linear program, solved exactly by HiGHS through `scipy.optimize.milp`: a binary variable says whether a
block takes a level, one level per block.
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
"""Removal levels of a block that the program chooses from."""

_SOLVER = {"mip_rel_gap": 1e-6, "node_limit": 20_000}
"""A limit of nodes, not of time: the same numbers give the same allocation on every machine."""

Curves = Mapping[BlockKey, NDArray[np.float64]]
"""Damage of every block by number of removed units, 0 … the most that may go."""


def allocate_optimal(
    blocks: Sequence[BlockBudget], budget: Budget, options: AllocationOptions = DEFAULT_OPTIONS
) -> Removed:
    """Choose the counts of least total damage that remove as much as `global` does and no more than asked.

    Damage is the sum of the removed units' scores, or read from `options.curves`, linear between their points. The
    result is exact where no block has more than `LEVELS` counts. Of larger blocks the program sees levels over the
    whole range, then finer ones around what it chose, and what they leave of the budget is filled step by step; the
    result is never worse than that of `global`.

    Raises:
        ValueError: if the limits cannot meet the budget, with the nearest reachable rate; if a curve is missing, ends
            too early or is not finite.
    """
    free = find_free_blocks(blocks, budget, options)
    curves = {block.key: _read_curve(block, options) for block in free}
    best = greedy = allocate_global(free, budget)
    for finer in (False, True):
        solved = _solve(free, budget, curves, greedy, best if finer else None) or greedy
        candidates = [best, _fill_up(free, budget, curves, solved)]
        if _count_parameters(free, solved) >= _count_parameters(free, greedy):
            candidates.append(solved)  # filling may cost more than it has to
        best = min(candidates, key=lambda removed: _sum_damage(curves, removed))
    return keep_frozen(blocks, best)


def thin_counts(counts: Sequence[int], most: int) -> list[int]:
    """At most so many of ascending counts, evenly spread, the first and the last included."""
    if len(counts) <= most:
        return list(counts)
    return [counts[round(i * (len(counts) - 1) / (most - 1))] for i in range(most)]


@dataclass(frozen=True)
class _Level:
    """One choice for a block, and what it is worth."""

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
            f"the damage curve of {block.key} ends at {removed[-1]} of {most} removable units: measure it to the end"
        )
    if not np.isfinite(damage).all():
        raise ValueError(f"the damage curve of {block.key} holds NaN or infinite values: measure it again")
    return np.asarray(np.interp(np.arange(most + 1), removed, damage), dtype=np.float64)


def _sum_damage(curves: Curves, removed: Removed) -> float:
    return float(sum(curve[removed[key]] for key, curve in curves.items()))


def _count_parameters(blocks: Sequence[BlockBudget], removed: Removed) -> int:
    return sum(removed[block.key] * block.unit_parameters for block in blocks)


def _solve(
    blocks: Sequence[BlockBudget], budget: Budget, curves: Curves, greedy: Removed, around: Removed | None
) -> Removed | None:
    """The levels of least damage; None if the solver found none within its limit."""
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
    # The solver's whole numbers are whole within a tolerance, which large blocks multiply.
    x = np.round(result.x)
    if any((limit.A @ x < limit.lb - 1e-7).any() or (limit.A @ x > limit.ub + 1e-7).any() for limit in constraints):
        return None
    return {level.key: level.removed for level, chosen in zip(levels, x, strict=True) if chosen}


def _list_levels(
    blocks: Sequence[BlockBudget], budget: Budget, curves: Curves, greedy: Removed, around: Removed | None
) -> tuple[list[_Level], int]:
    """Every block's levels, and the parameters that the program may leave to be filled in."""
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
    """Levels over all counts, and finer ones around one of them; and the units between the finest."""
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
    """One level per block; the budget; the limits of each layer; what attention has to give."""
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
    """What attention gives lies between what the budget asks and what whole groups came to."""

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
    """Remove single steps of least damage per parameter while they fit into the budget."""

    def damage(block: BlockBudget, before: int, after: int) -> float:
        curve = curves[block.key]
        return float(curve[after] - curve[before]) / ((after - before) * block.unit_parameters)

    steps = list_steps(blocks, damage)
    if budget.fixes_attention:
        steps = [step for step in steps if step.key.kind == "mlp"]
    tally = Tally(blocks, budget, removed)
    tally.fill(steps, budget.target)
    return tally.removed
