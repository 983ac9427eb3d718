"""The search for a split: it finds the minimum of a known curve, goes on where it stopped, and gating is cutting."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from gqaprune import prune
from gqaprune.commands.search import SearchSettings, find_best_split, search_split
from gqaprune.commands.trials import Trial, Trials
from gqaprune.data.calibration import CalibrationSet
from gqaprune.data.windows import make_batches
from gqaprune.evaluation.perplexity import measure_perplexity
from gqaprune.planning.allocation import Budget
from gqaprune.scoring.scores import score_units

from tiny import make_model, make_plain, make_tokens

BATCHES = [make_tokens(2, seed=seed) for seed in range(3)]
VALIDATION = {f"val/{n}": make_batches(make_tokens(4, seed=n), make_tokens(4, seed=n), 2) for n in (8, 9)}
SETTINGS = SearchSettings(coarse_step=2.0, fine_step=0.5)


class Curve:
    """Perplexity by the share of attention, and what was asked of it."""

    def __init__(self, perplexity: Callable[[float], float | None], most: float = math.inf) -> None:
        self.perplexity = perplexity
        self.most = most
        self.asked: list[str] = []

    def __call__(self, split: str) -> float:
        attention, mlp = map(float, split.split(":"))
        assert attention + mlp == pytest.approx(10)
        if len(self.asked) == self.most:
            raise KeyboardInterrupt
        self.asked.append(split)
        found = self.perplexity(attention)
        if found is None:
            raise Budget(0.2, 100, [100]).unreachable("too few")
        return found


@pytest.mark.parametrize("lowest", [0.0, 0.3, 3.4, 5.0, 7.8, 9.9, 10.0])
def test_search_finds_the_lowest_point_of_a_curve_with_few_trials(lowest: float) -> None:
    curve = Curve(lambda attention: 10 + abs(attention - lowest))
    best = search_split(curve, Trials({}), SearchSettings())
    assert best == Trial(f"{lowest:g}:{round(10 - lowest, 1):g}", 10.0)
    assert len(curve.asked) == len(set(curve.asked)) <= 11 + 18 < 101


def test_walks_end_after_as_many_rises_in_a_row_as_patience_says() -> None:
    curve = Curve(lambda attention: 10 + abs(attention - 2))
    search_split(curve, Trials({}), SearchSettings(patience=2))
    coarse, below, above = ["0:10", "1:9", "2:8", "3:7", "4:6"], ["1.9:8.1", "1.8:8.2"], ["2.1:7.9", "2.2:7.8"]
    assert curve.asked == coarse + below + above


def test_one_rise_does_not_end_a_walk_and_equal_values_are_none() -> None:
    values = [9, 10, 8, 8, 9, 9, 10, 7, 8, 9, 6]
    curve = Curve(lambda attention: values[round(attention)])
    assert search_split(curve, Trials({}), SearchSettings(1, 1, 2)).split == "2:8"  # 8, 8, 9, 9, 10
    assert curve.asked[-1] == "6:4"
    assert search_split(curve, Trials({}), SearchSettings(1, 1, 3)).split == "10:0"


def test_unreachable_splits_are_kept_as_such_and_walked_over() -> None:
    curve = Curve(lambda attention: None if attention < 2.5 else attention)
    trials = Trials({})
    assert search_split(curve, trials, SearchSettings(patience=1)) == Trial("2.5:7.5", 2.5)
    assert trials.trials["2:8"].perplexity is None and "too few" in trials.trials["2:8"].reason
    with pytest.raises(ValueError, match="no split meets the budget; the last one tried, 10:0, failed: .*too few"):
        search_split(Curve(lambda _: None), Trials({}), SearchSettings())


@pytest.mark.parametrize("most", [1, 5, 7, 11])
def test_search_that_broke_off_goes_on_without_trying_anything_twice(most: int, tmp_path: Path) -> None:
    path, settings = tmp_path / "new" / "search.json", SearchSettings(patience=2)

    def find(attention: float) -> float | None:
        return None if attention == 1 else 10 + abs(attention - 3.2)

    whole = Curve(find)
    expected = search_split(whole, Trials({"model": "tiny"}), settings)
    broken, rest, nothing = Curve(find, most), Curve(find), Curve(find)
    with pytest.raises(KeyboardInterrupt):
        search_split(broken, Trials({"model": "tiny"}, path), settings)
    for curve in (rest, nothing):
        trials = Trials({"model": "tiny"}, path)
        trials.read()
        assert search_split(curve, trials, settings) == expected
    assert broken.asked + rest.asked == whole.asked
    assert nothing.asked == []
    assert json.loads(path.read_text())["best"] == "3.2:6.8"


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"fine_step": 0.0}, "0.001 <= fine_step <= coarse_step <= 10, in tenths, got 0.0 and 1.0"),
        ({"fine_step": 2.0}, "got 2.0 and 1.0"),
        ({"coarse_step": 11.0}, "got 0.1 and 11.0"),
        ({"patience": 0}, "patience must be at least 1, got 0"),
    ],
)
def test_setting_out_of_bounds_is_refused(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        SearchSettings(**settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"allocation": "global", "criterion": "taylor"},
        {"allocation": "inverse", "sensitivity": {"alpha": 2.0}},
        {"allocation": "inverse", "sensitivity": {"method": "block_removal", "alpha": 3.0}},
        {"allocation": "uniform", "sensitivity": {"method": "block_removal"}, "limits": {"frozen_layers": 1}},
        {"allocation": "uniform", "granularity": "query"},
        {"allocation": "optimal", "damage": "gated", "damage_levels": 3, "granularity": "query"},
        {"allocation": "global", "repair": {"epochs": 0, "holdout": 0.3}},
        {"allocation": "optimal", "damage": "repaired", "repair": {"epochs": 0, "holdout": 0.3}},
    ],
)
def test_every_trial_is_the_perplexity_that_pruning_by_its_split_leaves(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scored = []
    monkeypatch.setattr(
        "gqaprune.planning.selection.score_units", lambda *given: scored.append(1) or score_units(*given)
    )
    model, config = make_model("qwen2", kv_heads=2, ratio=4, channels=40), make_plain(rate=0.2, **settings)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trials = find_best_split(
        model,
        CalibrationSet(BATCHES, accumulation=2, seed=3),
        config,
        replace(SETTINGS, folder=str(tmp_path)),
        VALIDATION,
    )
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert len(scored) == 1
    reached = [trial for trial in trials.ordered if trial.perplexity is not None]
    assert len({trial.perplexity for trial in reached}) > 2
    for trial in reached:
        cut = make_model("qwen2", kv_heads=2, ratio=4, channels=40)
        prune(cut, CalibrationSet(BATCHES, accumulation=2, seed=3), replace(config, split=trial.split))
        one, other = measure_perplexity(cut, VALIDATION).values()
        assert trial.perplexity == pytest.approx(math.sqrt(one * other), rel=1e-4)
    for trial in trials.ordered:
        if trial.perplexity is None:
            with pytest.raises(ValueError, match="cannot remove 20.00%"):
                prune(
                    make_model("qwen2", kv_heads=2, ratio=4, channels=40),
                    CalibrationSet(BATCHES, accumulation=2, seed=3),
                    replace(config, split=trial.split),
                )


def search(
    folder: Path, batches: Any = BATCHES, validation: Any = VALIDATION, seed: int = 0, **settings: Any
) -> Trials:
    config = make_plain(**{"rate": 0.2, "allocation": "global", **settings})
    where = replace(SETTINGS, folder=str(folder))
    return find_best_split(
        make_model(channels=40, seed=seed), CalibrationSet(batches, source="tiny"), config, where, validation
    )


def test_finished_search_is_read_and_nothing_is_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = search(tmp_path)
    monkeypatch.setattr("gqaprune.planning.selection.score_units", lambda *_: pytest.fail("scored again"))
    monkeypatch.setattr("gqaprune.commands.search.measure_perplexity", lambda *_: pytest.fail("measured again"))
    assert search(tmp_path).trials == first.trials


def test_splits_that_come_to_the_same_units_are_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = []
    monkeypatch.setattr(
        "gqaprune.commands.search.measure_perplexity", lambda *given: measured.append(1) or measure_perplexity(*given)
    )
    trials = search(tmp_path)
    assert len(measured) == len({trial.perplexity for trial in trials.ordered} - {None}) < len(trials.ordered)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"rate": 0.25}, "pruning.rate was 0.2, is 0.25"),
        ({"criterion": "taylor"}, "pruning.criterion was 'fisher', is 'taylor'"),
        ({"batches": BATCHES[:2]}, "calibration.batches"),
        ({"batches": BATCHES[::-1]}, "calibration.text"),
        ({"validation": {"val/8": VALIDATION["val/8"]}}, "validation.val/9 .*, is None"),
        ({"validation": {**VALIDATION, "val/9": VALIDATION["val/8"]}}, "validation.val/9 was '"),
        ({"seed": 1}, "weights was '"),
    ],
)
def test_trials_of_another_search_are_refused(change: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    search(tmp_path)
    with pytest.raises(ValueError, match=f"to another search: .*{sentence}.*or set search.folder"):
        search(tmp_path, **change)
    search(tmp_path, split="2:8", steps=2)  # what the search replaces or does not do makes no difference


def test_batches_of_other_sizes_are_the_same_validation_text(tmp_path: Path) -> None:
    one_by_one = {f"val/{n}": make_batches(make_tokens(4, seed=n), make_tokens(4, seed=n), 1) for n in (8, 9)}
    assert search(tmp_path).trials == search(tmp_path, validation=one_by_one).trials


def test_model_that_cannot_be_pruned_is_refused_before_any_split(tmp_path: Path) -> None:
    model = make_model("exaone4")
    model.config.model_type = "stranger"
    with pytest.raises(ValueError, match="'stranger' cannot be pruned yet"):
        find_best_split(
            model, CalibrationSet(BATCHES), make_plain(rate=0.2), replace(SETTINGS, folder=str(tmp_path)), VALIDATION
        )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"rate": 0.0}, "search needs pruning.rate above 0"),
        ({"kv_rate": 0.2}, "search chooses how much attention is removed, but pruning.kv_rate 0.2"),
        ({"validation": {}}, "search compares splits on validation text, got none"),
        ({"batches": []}, "needs at least one calibration batch"),
        ({"limits": {"attention_layers": (0, 0), "mlp_layers": (0, 0)}}, "leave no block to prune"),
        ({"rate": 0.97}, r"cannot remove 97\.00% .* the nearest reachable rate is"),
        ({"limits": {"frozen_layers": 3}}, "frozen_layers 3 leaves none of 3 layers to prune"),
    ],
)
def test_search_without_a_choice_is_refused(change: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=sentence):
        search(tmp_path, **change)


def test_budget_that_frozen_layers_leave_no_room_for_is_refused_before_units_are_scored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gqaprune.commands.search.score_blocks", lambda *_: pytest.fail("scored"))
    with pytest.raises(ValueError, match=r"^cannot remove 50\.00% .* nearest reachable rate is 0"):
        search(tmp_path, rate=0.5, limits={"frozen_layers": 2}, allocation="global")
