"""Invariant 3: the budget is met within one step and every limit holds, or an error says what is reachable."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gqaprune.plan import BlockKey, BlockKind
from gqaprune.planning.allocation import (
    ALLOCATIONS,
    AllocationOptions,
    BlockBudget,
    Budget,
    Removed,
    allocate_global,
    allocate_uniform,
)

from budgets import (
    ALLOCATE,
    check_limits,
    count_removed,
    make_block,
    make_budget,
    measure_half_step,
    measure_layers,
    read_nearest_rate,
    scores_of,
    sum_all,
)

Allocate = Callable[[Sequence[BlockBudget], Budget], Removed]
every = pytest.mark.parametrize("allocate", list(ALLOCATE.values()), ids=list(ALLOCATE))


@st.composite
def uniform_cases(draw: st.DrawFn) -> tuple[list[BlockBudget], Budget]:
    """MLP in every layer, attention in the first ones; at least one removal is possible in each."""
    layers = draw(st.integers(1, 4))
    groups, group_parameters = draw(st.integers(2, 6)), draw(st.integers(1, 50))
    multiple = draw(st.integers(1, 8))
    channels = multiple * draw(st.integers(2, 8)) + draw(st.integers(0, multiple - 1))
    channel_parameters = draw(st.integers(1, 10))
    min_channels = draw(st.integers(1, (channels - 1) // multiple * multiple))
    min_groups = draw(st.integers(1, groups))
    blocks = [make_block(i, "mlp", [0.0] * channels, channel_parameters, min_channels, multiple) for i in range(layers)]
    with_attention = draw(st.integers(0, layers))
    blocks += [make_block(i, "attention", [0.0] * groups, group_parameters, min_groups) for i in range(with_attention)]
    return blocks, make_budget(blocks, draw(st.floats(0, 1)), max_rate=draw(st.sampled_from([1.0, 0.6, 0.3])))


def list_equal_counts(blocks: Sequence[BlockBudget], budget: Budget) -> list[Removed]:
    """Every pair of equal counts that the limits allow, by trying all."""
    found = []
    most = {kind: max((b.units for b in blocks if b.key.kind == kind), default=0) for kind in ("attention", "mlp")}
    for groups, channels in product(range(most["attention"] + 1), range(most["mlp"] + 1)):
        removed = {block.key: groups if block.key.kind == "attention" else channels for block in blocks}
        try:
            check_limits(blocks, removed, budget)
        except AssertionError:
            continue
        found.append(removed)
    return found


@given(uniform_cases())
def test_uniform_removes_equal_counts_within_half_a_step_or_says_what_is_nearest(
    case: tuple[list[BlockBudget], Budget],
) -> None:
    blocks, budget = case
    half_step = measure_half_step(blocks)
    nearest = min(abs(count_removed(blocks, removed) - budget.target) for removed in list_equal_counts(blocks, budget))
    try:
        removed = allocate_uniform(blocks, budget)
    except ValueError as error:
        rate = read_nearest_rate(error)
        assert abs(rate - budget.rate) * budget.base_parameters == pytest.approx(nearest, abs=1.01e-4 * sum_all(blocks))
        again = allocate_uniform(blocks, replace(budget, rate=rate))
        assert count_removed(blocks, again) == pytest.approx(rate * budget.base_parameters, abs=half_step)
        return
    check_limits(blocks, removed, budget)
    for kind in ("attention", "mlp"):
        assert len({count for key, count in removed.items() if key.kind == kind}) <= 1
    assert abs(count_removed(blocks, removed) - budget.target) <= half_step


@given(uniform_cases())
def test_uniform_refuses_no_budget_that_one_of_its_counts_meets(case: tuple[list[BlockBudget], Budget]) -> None:
    blocks, budget = case
    for wanted in list_equal_counts(blocks, budget)[:40]:
        parameters = count_removed(blocks, wanted)
        removed = allocate_uniform(blocks, replace(budget, rate=parameters / budget.base_parameters))
        assert abs(count_removed(blocks, removed) - parameters) <= measure_half_step(blocks)


def test_uniform_takes_the_same_share_of_attention_and_mlp() -> None:
    blocks = [make_block(i, "attention", [0.0] * 4, 100) for i in range(3)]
    blocks += [make_block(i, "mlp", [0.0] * 40, 10) for i in range(3)]
    removed = allocate_uniform(blocks, make_budget(blocks, 0.25))
    assert removed == {block.key: 1 if block.key.kind == "attention" else 10 for block in blocks}


def test_uniform_lets_channels_make_up_for_what_whole_groups_cannot() -> None:
    blocks = [make_block(0, "attention", [0.0] * 2, 100), make_block(0, "mlp", [0.0] * 40, 10)]
    removed = allocate_uniform(blocks, make_budget(blocks, 0.3))  # 180 of 600
    assert removed == {BlockKey(0, "attention"): 1, BlockKey(0, "mlp"): 8}


def test_uniform_rounds_kept_channels_to_the_multiple() -> None:
    blocks = [make_block(i, "mlp", [0.0] * 100, 3, multiple=32) for i in range(2)]
    removed = allocate_uniform(blocks, make_budget(blocks, 0.3))
    assert set(removed.values()) == {36}  # 64 stay: nearer to 70 than 96


def test_uniform_works_on_attention_alone() -> None:
    blocks = [make_block(i, "attention", [0.0] * 4, 10) for i in range(2)]
    assert set(allocate_uniform(blocks, make_budget(blocks, 0.45)).values()) == {2}


def test_uniform_shrinks_attention_where_no_channel_may_go() -> None:
    blocks = [make_block(0, "attention", [0.0] * 4, 100), make_block(0, "mlp", [0.0] * 8, 10, min_kept=8)]
    removed = allocate_uniform(blocks, make_budget(blocks, 0.4))  # 192 of 480: nearest is two groups
    assert removed == {BlockKey(0, "attention"): 2, BlockKey(0, "mlp"): 0}


def test_uniform_keeps_every_layer_within_min_rate_and_max_rate() -> None:
    blocks = [make_block(i, "mlp", [0.0] * 40, 10) for i in range(2)] + [make_block(0, "attention", [0.0] * 4, 100)]
    budget = make_budget(blocks, 0.3, min_rate=0.1, max_rate=0.35)
    removed = allocate_uniform(blocks, budget)
    check_limits(blocks, removed, budget)


@st.composite
def global_blocks(draw: st.DrawFn, with_multiple: bool = True) -> list[BlockBudget]:
    blocks = []
    for layer in range(draw(st.integers(1, 4))):
        kinds: list[BlockKind] = draw(st.sampled_from([["attention"], ["mlp"], ["attention", "mlp"]]))
        for kind in kinds:
            multiple = draw(st.integers(1, 4)) if with_multiple and kind == "mlp" else 1
            scores = draw(st.lists(scores_of, min_size=1, max_size=12))
            min_kept = draw(st.integers(1, len(scores)))
            blocks.append(make_block(layer, kind, scores, draw(st.integers(1, 20)), min_kept, multiple))
    return blocks


@st.composite
def global_cases(draw: st.DrawFn) -> tuple[list[BlockBudget], Budget]:
    blocks = draw(global_blocks())
    return blocks, make_budget(blocks, draw(st.floats(0, 1)), max_rate=draw(st.sampled_from([1.0, 0.6, 0.3])))


def list_next_removals(blocks: Sequence[BlockBudget], removed: Removed, budget: Budget) -> list[int]:
    """Parameters of every further step that the limits allow."""
    found = []
    layers = measure_layers(blocks, removed, budget)
    for block in blocks:
        after = next((n for n in block.removable_counts() if n > removed[block.key]), None)
        if after is None:
            continue
        parameters = (after - removed[block.key]) * block.unit_parameters
        whole = budget.layer_parameters[block.key.layer]
        if round(layers[block.key.layer] * whole) + parameters <= budget.max_rate * whole:
            found.append(parameters)
    return found


@given(global_cases())
def test_global_meets_the_budget_from_below_within_one_step_or_says_what_is_nearest(
    case: tuple[list[BlockBudget], Budget],
) -> None:
    blocks, budget = case
    try:
        removed = allocate_global(blocks, budget)
    except ValueError as error:
        rate = read_nearest_rate(error)
        assert rate < budget.rate
        again = replace(budget, rate=rate + 1e-4)
        parameters = count_removed(blocks, allocate_global(blocks, again))
        assert parameters / budget.base_parameters == pytest.approx(rate, abs=1e-4)
        return
    check_limits(blocks, removed, budget)
    missing = budget.target - count_removed(blocks, removed)
    assert missing >= 0
    further = list_next_removals(blocks, removed, budget)
    assert missing < min(further, default=min(block.unit_parameters for block in blocks))


@given(global_blocks(), st.floats(0, 0.3))
def test_global_serves_min_rate_in_every_layer_or_refuses(blocks: list[BlockBudget], min_rate: float) -> None:
    budget = make_budget(blocks, 0.5, min_rate=min_rate)
    try:
        removed = allocate_global(blocks, budget)
    except ValueError:
        return
    check_limits(blocks, removed, budget)
    assert count_removed(blocks, removed) <= budget.target


@given(st.data())
def test_global_removes_the_lowest_scores_when_all_units_are_of_one_size(data: st.DataObject) -> None:
    scores = data.draw(st.lists(st.lists(scores_of, min_size=2, max_size=8), min_size=1, max_size=4))
    blocks = [make_block(layer, "mlp", block, 5, min_kept=1) for layer, block in enumerate(scores)]
    removable = sorted(score for block in blocks for score in block.scores[: block.units - 1])
    count = data.draw(st.integers(0, len(removable)))
    budget = make_budget(blocks, (count + 0.5) * 5 / sum_all(blocks))

    removed = allocate_global(blocks, budget)

    gone = sorted(score for block in blocks for score in block.scores[: removed[block.key]])
    assert gone == removable[:count]


def test_global_counts_a_score_per_parameter() -> None:
    small = make_block(0, "mlp", [1.0] * 10, 1)
    large = make_block(1, "mlp", [5.0] * 4, 10)  # 0.5 per parameter
    removed = allocate_global([small, large], make_budget([small, large], 0.6))  # 30 of 50
    assert removed == {small.key: 0, large.key: 3}


def test_global_takes_smaller_steps_where_a_large_one_no_longer_fits() -> None:
    small = make_block(0, "mlp", [1.0] * 10, 1)
    large = make_block(1, "mlp", [5.0] * 4, 10)
    removed = allocate_global([small, large], make_budget([small, large], 0.5))  # 25 of 50
    assert removed == {small.key: 5, large.key: 2}


def test_global_keeps_min_kept_units_even_if_all_their_scores_are_zero() -> None:
    blocks = [make_block(0, "mlp", [0.0] * 10, 1, min_kept=7), make_block(1, "mlp", [9.0] * 10, 1)]
    assert allocate_global(blocks, make_budget(blocks, 0.5)) == {blocks[0].key: 3, blocks[1].key: 7}


def test_global_stops_at_max_rate_of_a_layer() -> None:
    blocks = [make_block(i, "mlp", [float(i)] * 10, 1) for i in range(3)]
    removed = allocate_global(blocks, make_budget(blocks, 0.4, max_rate=0.5))
    assert [removed[block.key] for block in blocks] == [5, 5, 2]


def test_global_serves_min_rate_before_the_lowest_scores() -> None:
    blocks = [make_block(i, "mlp", [float(i)] * 10, 1) for i in range(3)]
    removed = allocate_global(blocks, make_budget(blocks, 0.4, min_rate=0.2))
    assert [removed[block.key] for block in blocks] == [8, 2, 2]


def test_global_asks_no_min_rate_of_a_layer_without_a_removable_unit() -> None:
    stuck = make_block(0, "attention", [1.0], 10)  # one KV head
    free = make_block(1, "mlp", [1.0] * 10, 1)
    removed = allocate_global([stuck, free], make_budget([stuck, free], 0.2, min_rate=0.1))
    assert removed == {stuck.key: 0, free.key: 4}


def test_global_does_not_depend_on_the_order_of_blocks() -> None:
    blocks = [make_block(i, kind, [0.0, 0.0, 1.0, 1.0, 2.0], 3) for i in range(3) for kind in ("attention", "mlp")]
    budget = make_budget(blocks, 0.37)
    assert allocate_global(blocks, budget) == allocate_global(blocks[::-1], budget)


@every
def test_same_numbers_give_the_same_allocation(allocate: Allocate) -> None:
    blocks = [make_block(i, "attention", [0.0] * 3, 30) for i in range(3)]
    blocks += [make_block(i, "mlp", [0.0, 1.0] * 10, 10) for i in range(3)]
    budget = make_budget(blocks, 0.33)
    assert allocate(blocks, budget) == allocate(blocks, budget)


@every
def test_rate_zero_removes_nothing(allocate: Allocate) -> None:
    blocks = [make_block(0, "attention", [0.0] * 3, 30), make_block(0, "mlp", [0.0] * 20, 10)]
    assert set(allocate(blocks, make_budget(blocks, 0.0)).values()) == {0}


@every
def test_unreachable_budget_is_refused_with_the_nearest_rate_which_is_then_accepted(allocate: Allocate) -> None:
    blocks = [make_block(i, "mlp", [1.0] * 10, 7, min_kept=4) for i in range(3)]
    budget = make_budget(blocks, 0.8)
    with pytest.raises(ValueError, match=r"cannot remove 80\.00% of 210 parameters") as caught:
        allocate(blocks, budget)
    rate = read_nearest_rate(caught.value)
    assert rate == 0.6
    assert set(allocate(blocks, replace(budget, rate=rate)).values()) == {6}


@every
def test_nearest_rate_is_exact_enough_for_models_of_many_units(allocate: Allocate) -> None:
    blocks = [make_block(i, "mlp", [1.0] * 20_000, 1, min_kept=6_333) for i in range(3)]
    budget = make_budget(blocks, 0.9)
    with pytest.raises(ValueError) as caught:
        allocate(blocks, budget)
    removed = allocate(blocks, replace(budget, rate=read_nearest_rate(caught.value)))
    assert set(removed.values()) == {13_667}


def test_global_that_min_rate_takes_too_much_for_names_a_rate_which_is_then_accepted() -> None:
    blocks = [make_block(i, "mlp", [1.0] * 10, 1) for i in range(3)]
    budget = make_budget(blocks, 0.1, min_rate=0.15)
    with pytest.raises(ValueError, match=r"min_rate 15\.00% already takes more") as caught:
        allocate_global(blocks, budget)
    assert set(allocate_global(blocks, replace(budget, rate=read_nearest_rate(caught.value))).values()) == {2}


@pytest.mark.parametrize("name", ["global", "inverse", "optimal"])
def test_channels_serve_min_rate_where_whole_groups_would_take_more_than_the_budget(name: str) -> None:
    blocks = [
        make_block(i, kind, scores, size)
        for i in range(4)
        for kind, scores, size in (("attention", [0.1] * 3, 100), ("mlp", [1.0] * 700, 1))
    ]
    budget, importance = make_budget(blocks, 0.06, min_rate=0.05), dict.fromkeys((block.key for block in blocks), 1.0)
    removed = ALLOCATIONS[name](blocks, budget, AllocationOptions(importance))
    check_limits(blocks, removed, budget)
    assert count_removed(blocks, removed) == 240


def test_min_rate_is_named_where_it_takes_more_than_a_rate_with_a_split() -> None:
    blocks = [make_block(0, "attention", [1.0] * 4, 10), make_block(0, "mlp", [1.0] * 6, 10)]
    with pytest.raises(ValueError, match=r"min_rate 15\.00% already takes more"):
        allocate_global(blocks, replace(make_budget(blocks, 0.15, min_rate=0.15), attention_share=1.0))


def test_global_that_min_rate_takes_too_much_for_names_a_rate_that_is_not_rounded_below_it() -> None:
    blocks = [make_block(i, "mlp", [1.0] * 9, 1) for i in range(3)]
    budget = make_budget(blocks, 0.05, min_rate=0.1)  # 3 of 27 go: 0.11111…
    with pytest.raises(ValueError, match="already takes more") as caught:
        allocate_global(blocks, budget)
    assert set(allocate_global(blocks, replace(budget, rate=read_nearest_rate(caught.value))).values()) == {1}


@every
def test_no_rate_is_offered_where_min_rate_rules_out_every_rate(allocate: Allocate) -> None:
    blocks = [make_block(0, "mlp", [1.0] * 10, 10, min_kept=9), make_block(1, "mlp", [1.0] * 10, 10)]
    with pytest.raises(ValueError, match=r"min_rate|rate within") as caught:
        allocate(blocks, make_budget(blocks, 0.3, min_rate=0.25))
    assert "nearest reachable rate" not in str(caught.value)


@pytest.mark.parametrize(
    ("units", "min_kept", "multiple", "counts"),
    [
        (5, 1, 1, [0, 1, 2, 3, 4]),
        (5, 3, 1, [0, 1, 2]),
        (20, 1, 8, [0, 4, 12]),
        (16, 1, 8, [0, 8]),
        (16, 9, 8, [0]),
        (5, 1, 8, [0]),
        (1, 1, 1, [0]),
    ],
)
def test_removable_counts_respect_min_kept_and_multiple(
    units: int, min_kept: int, multiple: int, counts: list[int]
) -> None:
    assert make_block(0, "mlp", [0.0] * units, 1, min_kept, multiple).removable_counts() == counts
