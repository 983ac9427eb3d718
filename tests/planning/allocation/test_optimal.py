"""`optimal`: what trying every combination finds, where that can be tried; never worse than greedy elsewhere."""

import random
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gqaprune.plan import BlockKey
from gqaprune.planning.allocation import (
    AllocationOptions,
    BlockBudget,
    Budget,
    Removed,
    allocate_global,
    allocate_optimal,
)
from gqaprune.planning.allocation.optimal import LEVELS, thin_counts

from budgets import check_limits, count_groups, count_removed, make_block, make_budget, models, sum_kind

Curves = dict[BlockKey, list[tuple[int, float]]]


def sum_damage(blocks: Sequence[BlockBudget], removed: Removed, curves: Curves | None) -> float:
    if curves is None:
        return sum(sum(block.scores[: removed[block.key]]) for block in blocks)
    return sum(float(np.interp(removed[key], *zip(*curve, strict=True))) for key, curve in curves.items())


def try_all(blocks: Sequence[BlockBudget], budget: Budget, greedy: Removed, curves: Curves | None) -> float:
    """The least damage of all allocations that remove at least as much as the greedy one and keep every limit."""
    least = float("inf")
    for counts in product(*(block.removable_counts() for block in blocks)):
        removed = {block.key: count for block, count in zip(blocks, counts, strict=True)}
        if not count_removed(blocks, greedy) <= count_removed(blocks, removed) <= budget.target:
            continue
        if budget.kv_rate and count_groups(removed) != count_groups(greedy):
            continue
        try:
            check_limits(blocks, removed, budget)
        except AssertionError:
            continue
        least = min(least, sum_damage(blocks, removed, curves))
    return least


@st.composite
def tiny_cases(draw: st.DrawFn) -> tuple[list[BlockBudget], Budget, Curves | None]:
    blocks = draw(models(most_layers=2, most_channels=7))
    low, high = draw(st.sampled_from([(0.0, 1.0), (0.0, 0.5), (0.1, 0.6)]))
    budget = make_budget(blocks, draw(st.floats(0.05, 0.8)), low, high)
    if draw(st.booleans()):
        kv_heads = sum(block.units for block in blocks if block.key.kind == "attention")
        budget = replace(budget, kv_rate=draw(st.floats(0.05, 0.8)), kv_heads=kv_heads)
    if draw(st.booleans()):
        return blocks, budget, None
    damage = st.floats(0, 10, allow_subnormal=False)
    return blocks, budget, {b.key: [(0, 0.0)] + [(n, draw(damage)) for n in b.removable_counts()[1:]] for b in blocks}


@given(tiny_cases())
@settings(max_examples=200, deadline=None)
def test_optimal_is_what_trying_every_combination_finds(
    case: tuple[list[BlockBudget], Budget, Curves | None],
) -> None:
    blocks, budget, curves = case
    try:
        greedy = allocate_global(blocks, budget)
    except ValueError:
        with pytest.raises(ValueError, match="nearest reachable|min_rate|no GQA group may go"):
            allocate_optimal(blocks, budget, AllocationOptions(curves=curves))
        return
    removed = allocate_optimal(blocks, budget, AllocationOptions(curves=curves))
    check_limits(blocks, removed, budget)
    if budget.target >= count_removed(blocks, greedy):  # not where the KV-cache budget was rounded up to it
        least = try_all(blocks, budget, greedy, curves)
        assert sum_damage(blocks, removed, curves) == pytest.approx(least, rel=1e-5, abs=1e-5 * max(1, least))


def test_channels_that_fit_but_cost_more_than_they_have_to_stay() -> None:
    attention, mlp = BlockKey(0, "attention"), BlockKey(0, "mlp")
    blocks = [
        BlockBudget(attention, [0.0, 1.0, 1.0, 1.0], 7, unit_kv_heads=1),
        BlockBudget(mlp, [0.0] * 6, 1, min_kept=4),
    ]
    curves = {attention: [(count, 0.0) for count in range(4)], mlp: [(0, 0.0), (1, 1.0), (2, 1.0)]}
    budget = Budget(rate=0.46875, base_parameters=34, layer_parameters=[34])
    assert allocate_optimal(blocks, budget, AllocationOptions(curves=curves)) == {attention: 2, mlp: 0}


def make_large(seed: int, layers: int = 6, channels: int = 300) -> list[BlockBudget]:
    dice = random.Random(seed)
    blocks = []
    for layer in range(layers):
        scale = 2 ** dice.uniform(-3, 3)
        groups = [dice.lognormvariate(0, 1) * scale * 30 for _ in range(4)]
        blocks.append(replace(make_block(layer, "attention", groups, 301), unit_kv_heads=1))
        blocks.append(make_block(layer, "mlp", [dice.lognormvariate(0, 1.5) * scale for _ in range(channels)], 10))
    return blocks


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "limits",
    [{}, {"min_rate": 0.1, "max_rate": 0.35}, {"attention_share": 0.3}, {"kv_rate": 0.33, "kv_heads": 24}],
    ids=["free", "layers", "split", "kv"],
)
def test_optimal_of_large_blocks_meets_the_budget_and_is_never_worse_than_greedy(
    seed: int, limits: dict[str, float]
) -> None:
    blocks = make_large(seed)
    budget = replace(make_budget(blocks, 0.25), **limits)  # type: ignore[arg-type]
    greedy, removed = allocate_global(blocks, budget), allocate_optimal(blocks, budget)
    check_limits(blocks, removed, budget)
    assert 0 <= budget.target - count_removed(blocks, removed) < 10
    assert sum_damage(blocks, removed, None) <= sum_damage(blocks, greedy, None)
    if budget.fixes_attention:
        assert sum_kind(blocks, removed, "attention") == sum_kind(blocks, greedy, "attention")


def test_optimal_is_better_than_greedy_where_a_group_fits_a_tight_layer_badly() -> None:
    # Greedy takes the cheap group first; layer 0 then has no room for its many cheap channels.
    blocks = [
        make_block(0, "attention", [9.0, 99.0], 100),
        make_block(0, "mlp", [1.0] * 60 + [50.0] * 140, 10),
        make_block(1, "mlp", [20.0] * 200, 10),
    ]
    budget = make_budget(blocks, 0.15, max_rate=0.28)
    greedy, removed = allocate_global(blocks, budget), allocate_optimal(blocks, budget)
    assert sum_damage(blocks, removed, None) <= sum_damage(blocks, greedy, None)


def test_measured_curves_overrule_scores() -> None:
    blocks = [make_block(layer, "mlp", [float(layer)] * 200, 10) for layer in range(2)]
    curves = {blocks[0].key: [(100, 50.0), (199, 90.0)], blocks[1].key: [(100, 1.0), (199, 2.0)]}
    removed = allocate_optimal(blocks, make_budget(blocks, 0.4), AllocationOptions(curves=curves))
    assert removed == {blocks[0].key: 0, blocks[1].key: 160}


@pytest.mark.parametrize(
    ("points", "message"),
    [
        ([(10, 1.0)], "layer 0 mlp ends at 10 of 199 removable units"),
        ([(199, float("nan"))], "layer 0 mlp contains NaN"),
        ([], "layer 0 mlp ends at 0 of 199"),
    ],
)
def test_curve_that_says_too_little_is_refused(points: list[tuple[int, float]], message: str) -> None:
    blocks = [make_block(0, "mlp", [1.0] * 200, 10)]
    with pytest.raises(ValueError, match=message):
        allocate_optimal(blocks, make_budget(blocks, 0.4), AllocationOptions(curves={blocks[0].key: points}))


def test_same_numbers_give_the_same_optimum() -> None:
    budget = make_budget(make_large(0), 0.3, 0.05, 0.5)
    assert allocate_optimal(make_large(0), budget) == allocate_optimal(make_large(0), budget)


@given(st.integers(1, 200), st.integers(2, LEVELS))
def test_thinned_counts_keep_the_ends_and_spread_evenly(length: int, most: int) -> None:
    counts = thin_counts(range(length), most)
    assert len(counts) == min(length, most) and (counts[0], counts[-1]) == (0, length - 1)
    gaps = [b - a for a, b in pairwise(counts)]
    assert max(gaps, default=0) - min(gaps, default=0) <= 1
