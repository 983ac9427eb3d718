"""Trials: read back as they were written, shown as a table and a curve."""

from pathlib import Path

import pytest
from rich.console import Console

from gqaprune.commands.trials import Trial, Trials, build_trials_table, draw_trials


def make_trials(path: Path | None = None, writes: bool = True) -> Trials:
    trials = Trials({"model": "tiny", "layers": (1, 2)}, path, writes)
    for trial in (Trial("2:8", 9.5), Trial("0:10", None, "too few"), Trial("1.5:8.5", 9.5), Trial("3:7", 11.25)):
        trials.add(trial)
    return trials


def test_trials_survive_their_file_and_rank_0_alone_writes_it(tmp_path: Path) -> None:
    path = tmp_path / "new" / "search.json"
    make_trials(path, writes=False)
    assert not path.exists()
    trials = make_trials(path)
    read = Trials({"layers": (1, 2), "model": "tiny"}, path)
    read.read()
    assert read.trials == trials.trials
    assert [file.name for file in path.parent.iterdir()] == ["search.json"]


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"format": "other"}', '{"format": "gqaprune-search/1"}'])
def test_file_that_is_no_search_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "search.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="search.json is not a search"):
        Trials({}, path).read()


def test_best_is_the_lowest_and_of_equals_the_one_tried_first() -> None:
    assert make_trials().best == Trial("2:8", 9.5)
    assert Trials({}).best is None


def test_table_has_a_row_for_every_split_in_order() -> None:
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(build_trials_table(make_trials(), "perplexity: whole split"))
    rows = [
        [cell.strip() for cell in line.split("│")[1:3]] for line in console.export_text().splitlines() if "│" in line
    ]
    assert rows == [["0:10", "cannot be met"], ["1.5:8.5", "9.500"], ["2:8", "9.500 best"], ["3:7", "11.250"]]


def test_curve_goes_through_the_measured_splits_and_marks_the_others() -> None:
    axes = draw_trials(make_trials(), "tiny").axes[0]
    measured, missed, best = axes.lines
    assert list(zip(measured.get_xdata(), measured.get_ydata(), strict=True)) == [(1.5, 9.5), (2, 9.5), (3, 11.25)]
    assert list(missed.get_xdata()) == [0.0]
    assert (best.get_label(), list(best.get_xdata())) == ("best 2:8: 9.50", [2.0])
