"""Trials of a search for the best split of attention and MLP: kept in a file, shown in a table and a curve."""

import json
import reprlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib.figure
from rich.table import Table

from gqaprune.common.atomic_files import write_atomically
from gqaprune.common.json_files import read_json
from gqaprune.reporting.charts import ATTENTION, DENSE, MLP, add_legend, make_figure, style_panel

FORMAT = "gqaprune-search/1"


@dataclass(frozen=True)
class Trial:
    """One split and its perplexity.

    Args:
        split: shares of attention and MLP in the removed parameters, which add up to 10.
        perplexity: perplexity on the validation corpora; None if the budget cannot be met with this split.
        reason: why it cannot be met.
    """

    split: str
    perplexity: float | None
    reason: str = ""

    @property
    def attention(self) -> float:
        """Attention's share of the removed parameters, in tenths."""
        return float(self.split.split(":")[0])


class Trials:
    """The trials of a search, written to a file after each, so that the same command resumes a stopped search.

    Args:
        origin: everything that perplexities depend on besides the split, as plain data.
        path: the JSON file; None keeps them in memory only.
        writes: whether this process writes the file (rank 0).
    """

    def __init__(self, origin: Mapping[str, Any], path: Path | None = None, writes: bool = True) -> None:
        self.origin = json.loads(json.dumps(origin))
        self.path = path
        self.writes = writes
        self.trials: dict[str, Trial] = {}

    def read(self) -> None:
        """Read the trials of an earlier search.

        Raises:
            ValueError: if the file is not a search, or has another origin.
        """
        assert self.path is not None
        data = read_json(self.path, "search")
        try:
            if data["format"] != FORMAT:
                raise ValueError(f"found {data['format']!r}")
            origin, trials = dict(data["origin"]), [_read_trial(trial) for trial in data["trials"]]
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{self.path} is not a search of format {FORMAT!r} ({error})") from None
        same_name = {"model": self.origin.get("model")}  # the name may differ, because the weights are compared
        if difference := _find_difference(origin | same_name, self.origin | same_name):
            raise ValueError(
                f"{self.path} belongs to another search: {difference}; use the settings of that search, or set "
                "search.folder to another folder"
            )
        self.trials = {trial.split: trial for trial in trials}

    def add(self, trial: Trial) -> None:
        """Add a trial, and write the file."""
        self.trials[trial.split] = trial
        if self.path is not None and self.writes:
            best = self.best
            data = {
                "format": FORMAT,
                "origin": self.origin,
                "best": best and best.split,
                "trials": [asdict(trial) for trial in self.trials.values()],
            }
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self.path, (json.dumps(data, indent=1) + "\n").encode())

    @property
    def best(self) -> Trial | None:
        """The reachable trial of lowest perplexity; among equals, the one tried first."""
        reached = [(trial.perplexity, trial) for trial in self.trials.values() if trial.perplexity is not None]
        return min(reached, key=lambda pair: pair[0])[1] if reached else None

    @property
    def ordered(self) -> list[Trial]:
        """All trials, sorted by their share of attention."""
        return sorted(self.trials.values(), key=lambda trial: trial.attention)


def _read_trial(data: Any) -> Trial:
    trial = Trial(**data)
    is_measured = isinstance(trial.perplexity, (int, float)) or trial.perplexity is None
    if not is_measured or not isinstance(trial.reason, str) or not 0 <= trial.attention <= 10:
        raise ValueError(f"found the trial {reprlib.repr(data)}")
    return trial


def build_trials_table(trials: Trials, protocol: str = "") -> Table:
    """Build a table with one row per split."""
    table = Table(title="perplexity by split", caption=protocol or None, caption_style="dim", title_justify="left")
    table.add_column("attention:MLP", justify="right", no_wrap=True)
    table.add_column("ppl", justify="right", no_wrap=True)
    for trial in trials.ordered:
        value = "cannot be met" if trial.perplexity is None else f"{trial.perplexity:.3f}"
        is_best = trial == trials.best
        table.add_row(trial.split, value + (" best" if is_best else ""), style="bold" if is_best else None)
    return table


def draw_trials(trials: Trials, title: str) -> matplotlib.figure.Figure:
    """Draw perplexity over the share of attention, with crosses on the axis for splits that cannot be met."""
    figure = make_figure(title, 3.8)
    axes = figure.subplots()
    reached = [(trial.attention, trial.perplexity) for trial in trials.ordered if trial.perplexity is not None]
    missed = [trial.attention for trial in trials.ordered if trial.perplexity is None]
    axes.plot(*zip(*reached, strict=True), marker="o", color=ATTENTION, label="measured")
    if missed:
        floor = axes.get_xaxis_transform()  # x in tenths, y in shares of the panel
        axes.plot(missed, [0.03] * len(missed), "x", color=DENSE, transform=floor, label="cannot be met")
    best = trials.best
    if best is not None and best.perplexity is not None:
        label = f"best {best.split}: {best.perplexity:.2f}"
        axes.plot([best.attention], [best.perplexity], "o", markersize=10, color=MLP, label=label)
    style_panel(axes, x="attention's tenths of the removed parameters (x of x:10−x)", y="validation perplexity")
    add_legend(axes, 1, "best")
    return figure


def _find_difference(saved: Any, present: Any, name: str = "") -> str | None:
    """Describe the first difference of two origins; None if they are equal."""
    if isinstance(saved, dict) and isinstance(present, dict):
        for key in (*saved, *(key for key in present if key not in saved)):
            found = _find_difference(saved.get(key), present.get(key), f"{name}.{key}".lstrip("."))
            if found:
                return found
        return None
    return None if saved == present else f"{name} was {saved!r}, is {present!r}"
