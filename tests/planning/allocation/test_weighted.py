"""`inverse` and `proportional`: the order of rates follows importance, and clipping costs no budget."""

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gqaprune.plan import BlockKey
from gqaprune.planning.allocation import AllocationOptions, BlockBudget, allocate_inverse, allocate_proportional

from budgets import (
    allocate_by,
    check_limits,
    count_removed,
    make_block,
    make_budget,
    measure_layers,
    models,
    read_nearest_rate,
)


def make_mlps(layers: int, channels: int = 1000) -> list[BlockBudget]:
    return [make_block(layer, "mlp", [0.0] * channels, 3) for layer in range(layers)]


importances = st.lists(st.floats(-5, 100), min_size=2, max_size=6)


@given(
    importances, st.floats(0.05, 0.6), st.floats(0.1, 3), st.booleans(), st.sampled_from(["inverse", "proportional"])
)
@settings(deadline=None)
def test_layers_lose_in_the_order_of_their_importance(
    importance: list[float], rate: float, alpha: float, log: bool, name: str
) -> None:
    blocks = make_mlps(len(importance), 200)
    values = {block.key: value for block, value in zip(blocks, importance, strict=True)}
    budget = make_budget(blocks, rate)
    removed = allocate_by(name, importance=values, alpha=alpha, log=log)(blocks, budget)
    assert 0 <= budget.target - count_removed(blocks, removed) < 3
    ranked = sorted(blocks, key=lambda block: values[block.key], reverse=name == "proportional")
    lost = [removed[block.key] for block in ranked]
    assert all(more >= less - 1 for more, less in pairwise(lost))


@pytest.mark.parametrize(("name", "ratio"), [("inverse", 1 / 2.718281828), ("proportional", 2.718281828)])
def test_most_and_least_important_layer_differ_by_e_to_the_alpha(name: str, ratio: float) -> None:
    blocks = make_mlps(3)
    values = {block.key: [0.0, 5.0, 10.0][block.key.layer] for block in blocks}
    low, middle, high = allocate_by(name, importance=values)(blocks, make_budget(blocks, 0.2)).values()
    assert high / low == pytest.approx(ratio, rel=0.02)
    assert middle / low == pytest.approx(ratio**0.5, rel=0.02)


def test_alpha_of_zero_and_equal_importance_give_every_layer_the_same() -> None:
    blocks = make_mlps(4)
    budget = make_budget(blocks, 0.25)
    for options in ({"alpha": 0.0}, {"importance": {block.key: 3.0 for block in blocks}}):
        assert set(allocate_by("inverse", **options)(blocks, budget).values()) == {250}


def test_scale_and_origin_of_importance_do_not_matter() -> None:
    blocks = make_mlps(4)
    budget = make_budget(blocks, 0.25)
    values = {block.key: float(block.key.layer**2) for block in blocks}
    moved = {key: 7 * value - 3 for key, value in values.items()}
    for log in (False, True):
        one = allocate_by("inverse", importance=values, log=log)(blocks, budget)
        assert one == allocate_by("inverse", importance=moved, log=log)(blocks, budget)


def test_logarithm_lets_layers_differ_beside_an_outstanding_one() -> None:
    blocks = make_mlps(3)
    values = {block.key: [1.0, 2.0, 100.0][block.key.layer] for block in blocks}
    budget = make_budget(blocks, 0.25)
    plain, logged = (allocate_by("inverse", importance=values, log=log)(blocks, budget) for log in (False, True))

    def differ(removed: dict[BlockKey, int]) -> int:
        return removed[BlockKey(0, "mlp")] - removed[BlockKey(1, "mlp")]

    assert differ(plain) < 5 < differ(logged)


@pytest.mark.parametrize("name", ["inverse", "proportional"])
@pytest.mark.parametrize(("alpha", "low", "high"), [(3.0, 0.15, 0.5), (3.0, 0.0, 0.35), (1.0, 0.28, 1.0)])
def test_rates_are_clipped_and_the_rest_makes_up_the_budget(name: str, alpha: float, low: float, high: float) -> None:
    blocks = make_mlps(6)
    budget = make_budget(blocks, 0.3, low, high)
    removed = allocate_by(name, alpha=alpha)(blocks, budget)
    rates = list(measure_layers(blocks, removed, budget).values())
    assert low <= min(rates) and max(rates) <= high
    assert min(rates) == pytest.approx(low, abs=0.002) or max(rates) == pytest.approx(high, abs=0.002)
    assert 0 <= budget.target - count_removed(blocks, removed) < 3
    unclipped = sorted(rate for rate in rates if low + 0.002 < rate < high - 0.002)
    steps = [b / a for a, b in pairwise(unclipped)]
    assert steps == pytest.approx([2.718281828 ** (alpha / 5)] * len(steps), rel=0.05)  # their ratio stays


@given(models(), st.floats(0, 0.9), st.floats(0, 3), st.sampled_from(["inverse", "proportional"]))
@settings(deadline=None)
def test_budget_is_met_within_every_limit_or_the_rate_named_is(
    blocks: list[BlockBudget], rate: float, alpha: float, name: str
) -> None:
    budget = make_budget(blocks, rate, 0.0, 0.6)
    allocate = allocate_by(name, alpha=alpha)
    try:
        removed = allocate(blocks, budget)
    except ValueError as error:
        nearest = read_nearest_rate(error)
        assert nearest < rate
        removed = allocate(blocks, replace(budget, rate=nearest + 1e-4))
    check_limits(blocks, removed, budget)
    assert count_removed(blocks, removed) <= budget.target


def test_attention_and_mlp_of_a_layer_lose_the_same_share_to_the_nearest_group() -> None:
    blocks = [make_block(0, "attention", [0.0] * 8, 100), make_block(0, "mlp", [0.0] * 400, 5)]
    options = AllocationOptions({block.key: 1.0 for block in blocks})
    for rate, groups in ((0.17, 1), (0.22, 2), (0.28, 2), (0.34, 3)):
        removed = allocate_inverse(blocks, make_budget(blocks, rate), options)
        assert removed[BlockKey(0, "attention")] == groups


def test_importance_that_is_missing_or_not_finite_is_refused() -> None:
    blocks = make_mlps(2)
    budget = make_budget(blocks, 0.2)
    with pytest.raises(ValueError, match="allocation inverse needs the importance of every layer"):
        allocate_inverse(blocks, budget)
    with pytest.raises(ValueError, match="finite importance of layer 1 mlp"):
        allocate_proportional(blocks, budget, AllocationOptions({blocks[0].key: 1.0}))
    with pytest.raises(ValueError, match="alpha must be in"):
        AllocationOptions(alpha=-1.0)
