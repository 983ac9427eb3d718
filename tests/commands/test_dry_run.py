"""What a run would do is said before it, and nothing of it is done."""

import re
from pathlib import Path
from typing import Any

import pytest

import gqaprune
from gqaprune import PruningConfig
from gqaprune.commands.device_speed import show_time
from gqaprune.common.console import console
from gqaprune.planning.costs.base import Text
from gqaprune.planning.stages import StageCounter, Work, list_stages

from command import Run

WORK = Work(Text(8, 125), trains=True)


@pytest.mark.parametrize("command", ["fit", "prune", "search", "sweep"])
def test_a_dry_run_says_sizes_memory_and_stages_and_writes_nothing(
    run: Run,
    command: str,
    tiny_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(console, "quiet", False)
    before = sorted(tmp_path.rglob("*"))
    rates = ["--rates", "0.1,0.2"] if command == "sweep" else []
    assert run(command, "--dry_run", "--pruning.kv_rate", "0.5", *rates) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert (
        f"{gqaprune.load_model(tiny_folder).num_parameters():,}" in shown
        and "1 of " in shown
        and "scores, fisher" in shown
    )
    assert ("training" in shown) == (command == "fit") and "KV cache, 32,768 tokens" in shown
    assert sorted(tmp_path.rglob("*")) == before


def test_a_budget_that_cannot_be_met_is_refused_in_a_dry_run_too(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("prune", "--dry_run", "--pruning.rate", "0.99") == 1
    assert "cannot remove 99.00%" in capsys.readouterr().err


def test_stages_follow_from_the_settings() -> None:
    default = list_stages(PruningConfig(), WORK)
    assert default[2] == "scores, fisher+obs" and "distillation" in default and "training" in default
    bare: dict[str, Any] = {"repair": {"method": "none"}, "scoring": {"protect_outliers": False}}
    plain = PruningConfig(criterion="l2", allocation="global", **bare)
    names = list_stages(plain, Work(Text(8, 125), Text(1, 10)))
    assert names[0] == "the model writes text" and "distillation" not in names and "training" not in names
    assert [show_time(seconds) for seconds in (3.21, 90, 7200, 4.5e6)] == ["3.2 s", "1.5 min", "2 h", "1,250 h"]


def test_a_run_says_which_stage_of_how_many_it_is_in_and_says_those_that_its_dry_run_names(
    run: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "quiet", False)
    assert run("fit", "--dry_run") == 0
    listed = re.findall(r"(\d+) of (\d+)[ │]+([^│]+?)(?:  | │)", capsys.readouterr().out)
    assert run("fit") == 0
    said = re.findall(r"stage (\d+) of (\d+): (.+)", capsys.readouterr().out)
    assert said and said == listed
    assert [int(number) for number, _, _ in said] == list(range(1, len(said) + 1))


def test_a_stage_is_said_once_until_another_one_begins(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "quiet", False)
    counter = StageCounter(["cut", "training"])
    for name in ("cut", "cut", "unknown", "training", "cut"):
        counter.begin(name)
    assert capsys.readouterr().out.splitlines() == ["stage 1 of 2: cut", "stage 2 of 2: training", "stage 1 of 2: cut"]
