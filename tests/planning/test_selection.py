"""What allocations know of blocks."""

import pytest
import torch

from gqaprune import PruningConfig
from gqaprune.models.architecture import find_blocks
from gqaprune.planning.selection import budget_blocks, choose_middle_layers, select_blocks

from tiny import make_model, make_plain


def test_what_goes_from_all_groups_at_once_scores_the_sum_weakest_first() -> None:
    blocks = find_blocks(make_model("llama", kv_heads=2, ratio=3, layers=1), "query")
    scores = {blocks[0].key: torch.tensor([5.0, 1.0, 3.0, 20.0, 30.0, 10.0]), blocks[1].key: torch.arange(17.0)}
    attention, mlp = budget_blocks(blocks, scores, make_plain(granularity="query"))
    assert attention.scores == [11.0, 23.0, 35.0]
    assert mlp.scores == [0.0, 0.0, 0.0, *range(17)]  # 3 of 20 channels are gone


def test_only_whole_groups_take_kv_heads_with_them() -> None:
    model = make_model("llama", kv_heads=2, ratio=3, layers=1)
    for granularity, kv_heads in (("group", [1, 0]), ("query", [0, 0])):
        blocks = find_blocks(model, granularity)
        scores = {block.key: torch.ones(block.units) for block in blocks}
        budgets = budget_blocks(blocks, scores, make_plain(granularity=granularity))
        assert [budget.unit_kv_heads for budget in budgets] == kv_heads


def test_without_ranges_the_ends_of_the_model_stay_whole() -> None:
    model = make_model("llama", layers=14)
    for config, attention in (
        (PruningConfig(), range(14)),
        (PruningConfig(allocation="uniform", split="free"), range(2, 13)),
    ):
        keys = [block.key for block in select_blocks(model, config)]
        assert [key.layer for key in keys if key.kind == "mlp"] == list(range(2, 13))
        assert [key.layer for key in keys if key.kind == "attention"] == list(attention)
    whole = {"limits": {"attention_layers": (0, 14), "mlp_layers": (0, 14)}}
    assert len(select_blocks(model, PruningConfig(**whole, split="free"))) == 28


@pytest.mark.parametrize(("layers", "middle"), [(1, (0, 1)), (6, (0, 6)), (14, (2, 13)), (30, (4, 28)), (34, (4, 32))])
def test_middle_is_all_but_the_first_seventh_and_the_last_fourteenth(layers: int, middle: tuple[int, int]) -> None:
    assert choose_middle_layers(layers) == range(*middle)


@pytest.mark.parametrize(("split", "kinds"), [(None, {"mlp"}), ("0:10", {"mlp"}), ("10:0", {"attention"})])
def test_what_a_split_spares_is_not_even_scored(split: str | None, kinds: set[str]) -> None:
    blocks = select_blocks(make_model("llama"), PruningConfig(allocation="uniform", split=split))
    assert {block.key.kind for block in blocks} == kinds and len(blocks) == 3
