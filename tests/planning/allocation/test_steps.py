"""Spending a budget in several cuts: shares, what is gone stays gone, and the end is what one cut would reach."""

import random
from collections.abc import Sequence

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from gqaprune.planning.allocation import ALLOCATIONS, BlockBudget, Budget, Removed, allocate_global
from gqaprune.planning.allocation.steps import Spending, spend_share

from budgets import allocate_by, check_limits, count_removed, make_block, make_budget


def make_blocks(layers: int, rng: random.Random, multiple: int = 1) -> list[BlockBudget]:
    blocks = []
    for layer in range(layers):
        blocks.append(make_block(layer, "attention", [rng.random() for _ in range(4)], 30))
        blocks.append(make_block(layer, "mlp", [rng.random() for _ in range(32)], 10, multiple=multiple))
    return blocks


def score_anew(blocks: Sequence[BlockBudget], so_far: Removed, rng: random.Random) -> list[BlockBudget]:
    """Other scores for the units that are left, 0 for those that are gone."""
    return [
        BlockBudget(
            block.key,
            [0.0] * so_far[block.key] + sorted(rng.random() for _ in range(block.units - so_far[block.key])),
            block.unit_parameters,
            block.min_kept,
            block.multiple,
        )
        for block in blocks
    ]


@pytest.mark.parametrize("name", list(ALLOCATIONS))
@given(
    rate=st.floats(0.02, 0.6),
    steps=st.integers(1, 6),
    multiple=st.sampled_from([1, 4]),
    tightness=st.sampled_from([None, 0.5, 0.95]),
    seed=st.integers(0, 1000),
)
def test_every_share_is_spent_and_the_whole_meets_the_budget_within_its_limits(
    name: str, rate: float, steps: int, multiple: int, tightness: float | None, seed: int
) -> None:
    rng, allocate = random.Random(seed), allocate_by(name)
    blocks = make_blocks(3, rng, multiple)
    limits = {} if tightness is None else {"min_rate": rate * tightness, "max_rate": min(1.0, rate / tightness)}
    budget = make_budget(blocks, rate, **limits)
    try:
        allocate(blocks, budget)
    except ValueError:
        assume(False)
    spending = None
    for step in range(1, steps + 1):
        before = spending.so_far if spending else {block.key: 0 for block in blocks}
        spending = spend_share(blocks, budget, allocate, step / steps, spending)
        assert all(spending.so_far[key] >= count for key, count in before.items())
        in_all, spent = count_removed(blocks, spending.in_all), count_removed(blocks, spending.so_far)
        most = max(count_removed(blocks, before), in_all * step / steps)
        assert in_all * step / steps - 30 * multiple < spent <= most
        check_limits(blocks, spending.in_all, budget)
        assert abs(in_all - budget.target) <= (15 * multiple if name == "uniform" else 30 * multiple)
        blocks = score_anew(blocks, spending.so_far, rng)
    assert spending is not None and spending.so_far == spending.in_all


def test_one_step_is_the_allocation_itself() -> None:
    blocks = make_blocks(3, random.Random(0))
    budget = make_budget(blocks, 0.3)
    for allocate in map(allocate_by, ALLOCATIONS):
        assert spend_share(blocks, budget, allocate, 1.0).so_far == allocate(blocks, budget)


def test_first_share_takes_the_least_important_of_what_goes_in_all() -> None:
    weak, strong = make_block(0, "mlp", [1.0] * 8, 10), make_block(1, "mlp", [2.0] * 8, 10)
    spending = spend_share([weak, strong], make_budget([weak, strong], 0.5), ALLOCATIONS["uniform"], 0.5)
    assert spending.in_all == {weak.key: 4, strong.key: 4}
    assert spending.so_far == {weak.key: 4, strong.key: 0}


def refuse(blocks: Sequence[BlockBudget], budget: Budget) -> Removed:
    raise budget.unreachable("nothing goes")


def test_allocation_that_finds_no_way_on_leaves_the_last_steps_counts() -> None:
    blocks = make_blocks(2, random.Random(0))
    budget = make_budget(blocks, 0.4)
    first = spend_share(blocks, budget, allocate_global, 0.5)
    assert spend_share(blocks, budget, refuse, 1.0, first).so_far == first.in_all
    with pytest.raises(ValueError, match="nothing goes"):
        spend_share(blocks, budget, refuse, 0.5)


@pytest.mark.parametrize("share", [0.1, 1.0])
def test_units_that_are_gone_are_never_put_back(share: float) -> None:
    blocks = make_blocks(1, random.Random(0))
    budget = make_budget(blocks, 0.4)
    attention, mlp = (block.key for block in blocks)
    last = Spending(so_far={attention: 2, mlp: 4}, in_all={attention: 2, mlp: 11})

    def put_back(blocks: Sequence[BlockBudget], budget: Budget) -> Removed:
        return {attention: 1, mlp: 14}

    spending = spend_share(blocks, budget, put_back, share, last)
    assert spending == Spending(last.so_far if share < 1 else last.in_all, last.in_all)
