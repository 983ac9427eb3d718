"""What a budget says of attention: a split of what is removed, or a share of the KV cache."""

import re
from dataclasses import replace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from gqaprune.plan import BlockKey
from gqaprune.planning.allocation import AllocationOptions, BlockBudget, Budget, parse_split
from gqaprune.planning.allocation.budget import find_free_blocks

from budgets import (
    ALLOCATE,
    allocate_by,
    check_limits,
    count_groups,
    count_removed,
    make_block,
    make_budget,
    models,
    read_nearest_rate,
    sum_kind,
)

every = pytest.mark.parametrize("name", list(ALLOCATE))
in_order = st.sampled_from(["global", "inverse", "proportional", "optimal"])
limits = st.sampled_from([(0.0, 1.0), (0.0, 0.6), (0.0, 0.3), (0.1, 0.6), (0.2, 1.0)])


def unit_of(blocks: list[BlockBudget]) -> int:
    """The smallest step that channels make up a budget with."""
    return max(block.multiple * block.unit_parameters for block in blocks if block.key.kind == "mlp")


@given(models(), in_order, st.floats(0.01, 0.9), st.floats(0, 1), limits)
@settings(max_examples=150, deadline=None)
def test_split_is_kept_within_one_group_and_the_budget_within_one_step_or_a_rate_is_named(
    blocks: list[BlockBudget], name: str, rate: float, share: float, bounds: tuple[float, float]
) -> None:
    budget = replace(make_budget(blocks, rate, *bounds), attention_share=share)
    group = blocks[0].unit_parameters

    def check(budget: Budget) -> None:
        removed = ALLOCATE[name](blocks, budget)
        excluded = {0.0: "attention", 1.0: "mlp"}.get(share)  # min_rate asks nothing of what may not shrink
        check_limits([replace(b, min_kept=b.units) if b.key.kind == excluded else b for b in blocks], removed, budget)
        assert abs(sum_kind(blocks, removed, "attention") - share * budget.target) <= group
        missing = budget.target - count_removed(blocks, removed)
        can_grow = any(b.removable_counts()[-1] > removed[b.key] for b in blocks if b.key.kind == "mlp" != excluded)
        assert 0 <= missing < (unit_of(blocks) * 2 if can_grow else max(group, unit_of(blocks))) or bounds[1] < 1

    try:
        check(budget)
    except ValueError as error:
        if "nearest reachable rate" in str(error):
            check(replace(budget, rate=read_nearest_rate(error)))


@given(models(), in_order, st.floats(0.01, 0.7), st.floats(0.01, 0.9), limits)
@settings(max_examples=150, deadline=None)
def test_kv_budget_is_met_to_the_nearest_group_and_channels_make_up_the_rest_or_a_rate_is_named(
    blocks: list[BlockBudget], name: str, rate: float, kv_rate: float, bounds: tuple[float, float]
) -> None:
    kv_heads = sum(block.units for block in blocks if block.key.kind == "attention")
    budget = replace(make_budget(blocks, rate, *bounds), kv_rate=kv_rate, kv_heads=kv_heads)

    def check(budget: Budget) -> None:
        removed = ALLOCATE[name](blocks, budget)
        check_limits(blocks, removed, budget)
        reached = count_groups(removed)
        layers = sum(block.key.kind == "attention" for block in blocks)
        assert reached > 0
        assert abs(reached - budget.kv_rate * kv_heads) <= (layers / 2 + 1e-6 if name == "uniform" else 1)
        assert count_removed(blocks, removed) < budget.target + 1

    try:
        check(budget)
    except ValueError as error:
        if "nearest reachable rate" in str(error):
            check(replace(budget, rate=read_nearest_rate(error)))
        elif found := re.search(r"nearest reachable kv_rate is (\d\.\d+)", str(error)):
            again = replace(budget, kv_rate=float(found[1]))
            assume(again.kv_rate > 0)
            try:
                check(again)
            except ValueError as second:
                assert "kv_rate is" not in str(second)


def make_model() -> list[BlockBudget]:
    """Four layers of 3 groups of 30 parameters and 20 channels of 10: 290 each."""
    blocks = []
    for layer in range(4):
        attention = make_block(layer, "attention", [1.0 + layer, 2.0 + layer, 3.0 + layer], 30)
        blocks += [replace(attention, unit_kv_heads=1), make_block(layer, "mlp", [0.1 * n for n in range(20)], 10)]
    return blocks


@every
def test_split_of_2_to_8_takes_a_fifth_from_attention(name: str) -> None:
    blocks = make_model()
    removed = ALLOCATE[name](blocks, replace(make_budget(blocks, 0.5), attention_share=0.2))  # 580, 116 of attention
    assert count_groups(removed) == 4
    assert abs(count_removed(blocks, removed) - 580) <= (20 if name == "uniform" else 9)


@every
@pytest.mark.parametrize(("share", "kind"), [(0.0, "attention"), (1.0, "mlp")])
def test_split_of_one_kind_alone_leaves_the_other_whole(name: str, share: float, kind: str) -> None:
    blocks = make_model()
    removed = ALLOCATE[name](blocks, replace(make_budget(blocks, 0.2), attention_share=share))
    assert {count for key, count in removed.items() if key.kind == kind} == {0}
    assert abs(count_removed(blocks, removed) - 232) <= (60 if name == "uniform" else 29)


@every
def test_kv_budget_alone_removes_groups_and_no_channel(name: str) -> None:
    blocks = make_model()
    removed = ALLOCATE[name](blocks, replace(make_budget(blocks, 0.0), kv_rate=0.33, kv_heads=12))
    assert count_groups(removed) == 4
    assert sum_kind(blocks, removed, "mlp") == 0


@pytest.mark.parametrize(("kv_rate", "groups"), [(0.2, 1), (0.3, 1), (0.5, 1), (0.55, 2), (0.6, 2), (0.7, 2)])
def test_equal_counts_take_the_nearest_number_of_kv_heads_within_half_a_step(kv_rate: float, groups: int) -> None:
    blocks = make_model()
    budget = replace(make_budget(blocks, 0.0), kv_rate=kv_rate, kv_heads=12)
    assert count_groups(ALLOCATE["uniform"](blocks, budget)) == 4 * groups


@every
def test_kv_budget_that_rounds_to_nothing_is_refused_with_the_least_that_does_not(name: str) -> None:
    blocks, least = make_model(), {"uniform": "0.3333"}.get(name, "0.0833")
    budget = replace(make_budget(blocks, 0.2), kv_rate=0.02, kv_heads=12)
    with pytest.raises(ValueError, match=f"cannot remove 2.00% of 12 KV heads: .* kv_rate is {least}"):
        ALLOCATE[name](blocks, budget)
    assert count_groups(ALLOCATE[name](blocks, replace(budget, kv_rate=float(least)))) > 0


@every
def test_attention_that_keeps_its_last_groups_is_asked_for_none(name: str) -> None:
    blocks = [replace(block, min_kept=3) if block.key.kind == "attention" else block for block in make_model()]
    for asked in ({"kv_rate": 0.3, "kv_heads": 12}, {"attention_share": 0.3}):
        with pytest.raises(ValueError, match=r"no GQA group may go"):
            ALLOCATE[name](blocks, replace(make_budget(blocks, 0.2), **asked))


@every
def test_kv_budget_and_rate_are_met_together(name: str) -> None:
    blocks = make_model()
    removed = ALLOCATE[name](blocks, replace(make_budget(blocks, 0.2), kv_rate=0.33, kv_heads=12))  # 232: 120 + 112
    assert count_groups(removed) == 4
    assert sum_kind(blocks, removed, "mlp") == (120 if name == "uniform" else 110)


@every
def test_kv_budget_that_takes_more_than_the_rate_is_refused_with_the_rate_that_is_reachable(name: str) -> None:
    blocks = make_model()
    budget = replace(make_budget(blocks, 0.05), kv_rate=0.33, kv_heads=12)  # 58, four groups are 120
    with pytest.raises(ValueError, match="nearest reachable rate") as caught:
        ALLOCATE[name](blocks, budget)
    removed = ALLOCATE[name](blocks, replace(budget, rate=read_nearest_rate(caught.value)))
    assert count_removed(blocks, removed) == 120


@every
def test_kv_budget_beyond_the_groups_that_may_go_names_the_nearest_kv_rate(name: str) -> None:
    blocks = make_model()
    budget = replace(make_budget(blocks, 0.0), kv_rate=0.9, kv_heads=12)
    with pytest.raises(ValueError, match=r"cannot remove 90.00% of 12 KV heads: .* kv_rate is 0.6666"):
        ALLOCATE[name](blocks, budget)
    assert count_groups(ALLOCATE[name](blocks, replace(budget, kv_rate=0.6666))) == 8


def test_split_that_channels_cannot_make_up_is_refused_with_a_rate_that_works() -> None:
    blocks = make_model()
    budget = replace(make_budget(blocks, 0.7), attention_share=0.0)  # channels: 760 of 1160 may go
    with pytest.raises(ValueError, match="split, min_groups") as caught:
        ALLOCATE["global"](blocks, budget)
    rate = read_nearest_rate(caught.value)
    assert rate == pytest.approx(760 / 1160, abs=0.01)
    ALLOCATE["global"](blocks, replace(budget, rate=rate))


@pytest.mark.parametrize(("text", "share"), [("2:8", 0.2), ("0:10", 0.0), ("5:5", 0.5), ("10:0", 1.0), ("1:3", 0.25)])
def test_split_is_read_as_the_share_of_attention(text: str, share: float) -> None:
    assert parse_split(text) == pytest.approx(share)


@pytest.mark.parametrize("text", ["", "2", "2:8:1", "a:b", "0:0", "-1:3", "nan:1", "inf:1"])
def test_no_split_is_refused_by_what_it_is(text: str) -> None:
    with pytest.raises(ValueError, match=f"got {text!r}; try 2:8"):
        parse_split(text)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"attention_share": 1.2}, r"attention_share must be in \[0, 1\], got 1.2"),
        ({"kv_rate": 1.0, "kv_heads": 3}, r"\[0, 1\)"),
        ({"kv_rate": 0.3}, "kv_rate 0.3 needs kv_heads, .*got 0"),
        ({"kv_rate": 0.3, "kv_heads": 3, "attention_share": 0.2}, "remove one of them"),
    ],
)
def test_settings_out_of_bounds_are_refused(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Budget(0.2, 100, [100], **settings)  # type: ignore[arg-type]


@every
def test_the_most_important_layers_are_frozen_whatever_min_rate_says(name: str) -> None:
    blocks = make_model()
    importance = {block.key: [3.0, 9.0, 1.0, 7.0][block.key.layer] for block in blocks}
    removed = allocate_by(name, importance=importance, frozen_layers=2)(blocks, make_budget(blocks, 0.2, 0.0))
    assert {layer for (layer, _), count in removed.items() if count} == {0, 2}
    assert removed.keys() == {block.key for block in blocks}
    if name != "uniform":
        again = allocate_by(name, importance=importance, frozen_layers=2)(blocks, make_budget(blocks, 0.2, 0.05))
        assert {layer for (layer, _), count in again.items() if count} == {0, 2}


def test_freezing_ranks_layers_by_the_mean_of_their_blocks() -> None:
    blocks = make_model()
    importance = {block.key: 1.0 for block in blocks} | {BlockKey(2, "mlp"): 5.0, BlockKey(1, "attention"): 3.0}
    free = find_free_blocks(blocks, make_budget(blocks, 0.1), AllocationOptions(importance, frozen_layers=1))
    assert {block.key.layer for block in free} == {0, 1, 3}


def test_freezing_needs_importance_and_leaves_a_layer() -> None:
    blocks = make_model()
    with pytest.raises(ValueError, match="frozen_layers needs the importance"):
        find_free_blocks(blocks, make_budget(blocks, 0.1), AllocationOptions(frozen_layers=1))
    importance = {block.key: 1.0 for block in blocks}
    with pytest.raises(ValueError, match="leaves none of 4 layers"):
        find_free_blocks(blocks, make_budget(blocks, 0.1), AllocationOptions(importance, frozen_layers=4))
