"""What whole units make of a request is said, with settings that do come nearer."""

import re
from typing import Any

import pytest

from gqaprune import PruningConfig
from gqaprune.common.console import console
from gqaprune.data.calibration import CalibrationSet
from gqaprune.pipeline import Pruner
from gqaprune.planning.allocation import Removed
from gqaprune.planning.preflight import check_reachable
from gqaprune.planning.rounding import describe_rounding
from gqaprune.planning.selection import read_budget, select_blocks
from gqaprune.reporting.report import Report, build_table

from tiny import make_model

SHAPES: dict[str, dict[str, int]] = {
    "MQA": {"kv_heads": 1, "ratio": 6},
    "two": {"kv_heads": 2, "ratio": 3},
    "MHA": {"kv_heads": 4, "ratio": 1},
}

PLAIN: dict[str, Any] = {"rate": 0.2, "criterion": "l2", "allocation": "uniform", "repair": {"method": "none"}}


def allocate(shape: str, **settings: Any) -> tuple[str, Removed]:
    """What is said, and what goes."""
    model = make_model(channels=64, layers=8, **SHAPES[shape])
    config = PruningConfig(**PLAIN | settings)
    blocks, budget = select_blocks(model, config), read_budget(model, config)
    removed = check_reachable(blocks, budget, config)
    assert removed is not None
    return describe_rounding(blocks, budget, removed, config), removed


def count_attention(removed: Removed) -> int:
    return sum(count for key, count in removed.items() if key.kind == "attention")


@pytest.mark.parametrize("shape", ["two", "MHA"])
@pytest.mark.parametrize("split", ["1:9", "2:8"])
def test_split_that_rounds_to_nothing_is_said_with_one_that_does_not(shape: str, split: str) -> None:
    said, removed = allocate(shape, split=split)
    assert count_attention(removed) == 0
    assert said.startswith(
        f"split {split} was rounded to 0:100 of attention and MLP, because one GQA group of every layer is "
    )
    reaching = re.search(r"; split (\d+:\d+) removes one; allocation: global can remove single ones$", said)
    assert reaching is not None
    assert count_attention(allocate(shape, split=reaching[1])[1]) > 0
    assert count_attention(allocate(shape, split=split, allocation="global")[1]) > 0


def test_query_heads_that_round_to_nothing_are_said() -> None:
    said, removed = allocate("two", granularity="query", split="1:9")
    assert count_attention(removed) == 0
    assert (
        "was rounded to 0:100 of attention and MLP, because one query head of every group of every layer is 43% of the "
        "removed parameters" in said
    )
    assert count_attention(allocate("two", granularity="query", split="44:56")[1]) > 0


def test_free_split_that_leaves_attention_whole_is_said() -> None:
    assert "split free was rounded to 0:100" in allocate("two", split="free")[0]
    assert "has no GQA group to spare: set granularity: query" in allocate("MQA", split="free")[0]


def test_step_larger_than_the_rate_names_a_rate() -> None:
    said, removed = allocate("two", rate=0.05, split="1:9")
    found = re.search(r"rate (\d\.\d+) with split 10:0 removes one", said)
    assert count_attention(removed) == 0 and found is not None
    assert count_attention(allocate("two", rate=float(found[1]), split="10:0")[1]) > 0


def test_kv_rate_names_what_it_came_to_and_what_comes_nearer() -> None:
    said, removed = allocate("MHA", rate=0.0, kv_rate=0.3)
    assert count_attention(removed) == 7
    assert said.startswith(
        "kv_rate 0.3 was rounded to 0.2188, 7 of 32 KV heads, the nearest with equal counts in every layer"
    )
    assert said.endswith("allocation: global removes 10")
    assert count_attention(allocate("MHA", rate=0.0, kv_rate=0.3, allocation="global")[1]) == 10
    assert allocate("MHA", rate=0.0, kv_rate=0.2188)[1] == removed
    assert allocate("two", rate=0.0, kv_rate=0.5)[0] == "kv_rate 0.5 was rounded to 0.4375, 7 of 16 KV heads"


def test_rate_below_one_step_is_said() -> None:
    said, removed = allocate("two", rate=0.001)
    assert not any(removed.values()) and "rate 0.001 rounds to nothing: the smallest step is 0.0082" in said
    assert any(allocate("two", rate=0.0082)[1].values())


@pytest.mark.parametrize("settings", [{}, {"split": "0:10"}, {"split": "10:0"}, {"kv_rate": 0.4375, "rate": 0.0}])
def test_nothing_is_said_of_what_is_met(settings: dict[str, Any]) -> None:
    assert allocate("two", **settings)[0] == ""


@pytest.mark.parametrize("shape", SHAPES)
def test_nothing_is_said_of_attention_that_was_not_asked_to_give(shape: str) -> None:
    assert allocate(shape, allocation="optimal", rate=0.01)[0] == ""
    assert allocate("MQA", allocation="optimal", split="free")[0].startswith("split free removes nothing")


def test_query_heads_of_multi_head_attention_are_refused() -> None:
    for split in (None, "free", "2:8"):
        with pytest.raises(ValueError, match="granularity: query keeps one query head .* set granularity: group"):
            allocate("MHA", granularity="query", split=split)
    assert allocate("MHA", granularity="query", split="0:10")[0] == ""


def test_it_is_said_at_once_and_stands_in_the_report_and_its_table(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "quiet", False)
    model = make_model(channels=64, layers=8, **SHAPES["two"])
    pruner = Pruner(model, CalibrationSet([]), PruningConfig(split="1:9", **PLAIN))
    assert "split 1:9 was rounded to 0:100" in capsys.readouterr().out
    pruner.measure("dense")
    pruner.spend()
    assert "split 1:9" not in capsys.readouterr().out
    assert pruner.report.rounding.startswith("split 1:9 was rounded to 0:100")
    assert pruner.report.rounding in str(build_table(pruner.report).caption)
    assert Report.from_dict(pruner.report.to_dict()).rounding == pruner.report.rounding
