"""What cannot be done is refused before the work, with what can."""

from typing import Any

import pytest

from gqaprune.models.architecture import find_blocks
from gqaprune.plan import BlockKey
from gqaprune.planning.allocation import AllocationOptions
from gqaprune.planning.preflight import check_equal_counts, check_reachable, check_repair, check_text
from gqaprune.planning.selection import read_budget

from tiny import make_model, make_plain, make_tokens


def test_text_is_asked_for_only_where_something_is_measured() -> None:
    model = make_model()
    check_text(model, [], make_plain(criterion="l1+random"))
    check_text(model, [], make_plain(rate=0.0))
    check_text(model, [make_tokens()], make_plain())
    with pytest.raises(
        ValueError,
        match="set criterion to one of l1, l2, random, allocation to uniform and repair.method to none",
    ):
        check_text(model, [], make_plain())


def test_calibration_text_longer_than_the_context_is_refused() -> None:
    model = make_model()
    check_text(model, [make_tokens(1, 256)], make_plain())
    with pytest.raises(
        ValueError, match="a window of the calibration text is 257 tokens, the model's context 256: set it to 256 or"
    ):
        check_text(model, [make_tokens(1, 32), make_tokens(1, 257)], make_plain())


@pytest.mark.parametrize("rate", [0.1, 0.9])
def test_budget_is_refused_with_the_nearest_rate_that_can_be_met(rate: float) -> None:
    model, config = make_model("llama"), make_plain(rate=rate, allocation="global")
    blocks, budget = find_blocks(model), read_budget(model, config)
    if rate == 0.1:
        check_reachable(blocks, budget, config)
        with pytest.raises(ValueError, match="limits.attention_layers and limits.mlp_layers leave no block to prune"):
            check_reachable([], budget, config)
    else:
        with pytest.raises(ValueError, match="the nearest reachable rate is 0."):
            check_reachable(blocks, budget, config)


def test_budget_of_frozen_layers_is_judged_once_importance_is_known() -> None:
    model, config = make_model("llama"), make_plain(rate=0.15, allocation="global", limits={"frozen_layers": 1})
    budget = read_budget(model, config)
    blocks = [block for block in find_blocks(model) if block.key.layer == 2 or block.key == BlockKey(0, "mlp")]
    check_reachable(blocks, budget, config)
    for important, is_reachable in ((0, True), (2, False)):
        importance = {block.key: float(block.key.layer == important) for block in blocks}
        options = AllocationOptions(importance, frozen_layers=1)
        if is_reachable:
            check_reachable(blocks, budget, config, options)
        else:
            with pytest.raises(ValueError, match="the limits leave too few units to remove; the nearest reachable"):
                check_reachable(blocks, budget, config, options)


@pytest.mark.parametrize(
    "settings",
    [
        {"allocation": "global"},
        {"limits": {"frozen_layers": 1}},
        {"swaps": {"generations": 1}},
        {"limits": {"mlp_layers": (1, 3)}},
    ],
)
def test_settings_that_leave_layers_of_unequal_shapes_are_refused(settings: dict[str, Any]) -> None:
    config = make_model("llama").config
    check_equal_counts(config, make_plain())
    check_equal_counts(config, make_plain(rate=0.0, **settings))
    way_out = (
        r"set allocation: uniform, limits.frozen_layers: 0, swaps.generations: 0, limits.attention_layers: \[0, 3\] "
        r"and limits.mlp_layers: \[0, 3\]; or use the format per-layer"
    )
    with pytest.raises(ValueError, match=way_out):
        check_equal_counts(config, make_plain(**settings))


def test_biases_are_refused_where_a_block_that_gets_one_has_no_place_for_it() -> None:
    model = make_model("qwen3")  # whose config has biases of attention alone
    attention = [block for block in find_blocks(model) if block.key.kind == "attention"]
    check_repair(model.config, attention, make_plain(repair={"method": "bias"}))
    with pytest.raises(ValueError, match="cannot store a bias of mlp output projections"):
        check_repair(model.config, find_blocks(model), make_plain(repair={"method": "bias"}))
    everywhere = make_plain(
        repair={"method": "least_squares", "bias": True}
    )  # blocks that lose nothing are refitted, too
    with pytest.raises(ValueError, match="cannot store a bias of mlp output projections"):
        check_repair(model.config, attention, everywhere)
