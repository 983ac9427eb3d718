"""Figures of the quality rows, from their JSON alone: peers beside ours. Every other row is in the tables."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter, StrMethodFormatter
from quality_report import Row, compute_gaps, compute_mean_gap, find_dense, list_rates, name_rate, rank_rows

from gqaprune.reporting.charts import (
    ATTENTION,
    DENSE,
    MLP,
    add_legend,
    add_shared_legend,
    make_figure,
    save_figure,
    style_layers,
    style_panel,
)

OURS = {
    "default": "gqaprune, default",
    "uniform channels": "gqaprune, uniform channels",
    "no repair": "gqaprune without repair",
}
THEIRS = {
    "optipfair-data": "OptiPFair, activations",
    "optipfair-maw": "OptiPFair, weights",
    "torch-pruning-taylor": "Torch-Pruning, Taylor",
    "torch-pruning-magnitude": "Torch-Pruning, magnitude",
}
"""Method -> its name in figures, which show these methods alone."""
NAMES = OURS | THEIRS
LARGEST = 3.0
"""Multiple of the dense perplexity at which the axis ends; longer bars have an arrow and their number."""


def choose_rows(rows: Sequence[Row], rate: float) -> list[Row]:
    """The rows that figures show at a rate, lowest mean gap first."""
    dense = find_dense(rows)
    ranked = rank_rows(rows, rate)
    return [row for row in ranked if row["method"] in NAMES and math.isfinite(compute_mean_gap(row, dense))]


def draw_gaps(rows: Sequence[Row], path: Path) -> None:
    """Draw perplexity as a multiple of the dense model's, with a panel per rate at which ours and a peer were measured.

    A bar is the geometric mean over the texts, a mark one text.
    """
    dense = find_dense(rows)
    chosen = {rate: choose_rows(rows, rate) for rate in list_rates(rows)}
    chosen = {
        rate: found
        for rate, found in chosen.items()
        if all(any(row["method"] in names for row in found) for names in (OURS, THEIRS))
    }
    if dense is None or not chosen:
        return
    heights = [0.36 * len(found) + 0.9 for found in chosen.values()]
    figure = make_figure(f"{dense['inputs']['model']}: perplexity after pruning, ours and peers'", sum(heights) + 0.3)
    panels = figure.subplots(len(chosen), 1, squeeze=False, sharex=True, height_ratios=heights)[:, 0]
    for axes, (rate, found) in zip(panels, chosen.items(), strict=True):
        _draw_ranking(axes, found, dense)
        style_panel(axes, name_rate(rate))
    add_legend(panels[0], 1)
    panels[-1].set_xlabel("perplexity as a multiple of the dense model's (lower is better)", fontsize=11)
    save_figure(figure, path)


def _draw_ranking(axes: Axes, found: Sequence[Row], dense: Row) -> None:
    """Draw a bar for every row, a mark for each of its texts that the axis has room for, and its number behind them."""
    colors = [ATTENTION if row["method"] in OURS else DENSE for row in found]
    means = [math.exp(compute_mean_gap(row, dense)) for row in found]
    axes.barh(
        range(len(found)), [min(mean, LARGEST) - 1 for mean in means], 0.7, 1.0, color=colors, label="mean of the texts"
    )
    ends = [min(mean, LARGEST) for mean in means]
    for text, mark in zip(compute_gaps(found[0], dense), "os^Dv", strict=False):
        multiples = [math.exp(compute_gaps(row, dense)[text]) for row in found]
        shown = [(value, place) for place, value in enumerate(multiples) if value <= LARGEST]
        values, places = zip(*shown, strict=True) if shown else ((), ())
        axes.plot(values, places, mark, color=MLP, markeredgecolor="black", markersize=7, label=text)
        ends = [max(end, value) if value <= LARGEST else end for end, value in zip(ends, multiples, strict=True)]
    for place, (mean, end) in enumerate(zip(means, ends, strict=True)):
        number = f"{mean:.2f}×" if mean <= LARGEST else f"→ {float(f'{mean:.2g}'):,.0f}×"
        axes.annotate(number, (end, place), (7, 0), textcoords="offset points", va="center", fontsize=11)
    axes.set_xlim(1.0, LARGEST + 0.45)
    axes.set_xticks([1.0, 1.5, 2.0, 2.5, LARGEST])
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}×"))
    axes.set_yticks(range(len(found)), [NAMES[row["method"]] for row in found])
    axes.set_ylim(len(found) - 0.5, -0.5)


def draw_layers(rows: Sequence[Row], path: Path, rate: float = 0.2) -> None:
    """Draw the share of each layer's MLP channels and query heads that was kept, with a panel for equal shapes."""
    dense = find_dense(rows)
    alike: dict[str, list[Row]] = {}
    for row in choose_rows(rows, rate):
        alike.setdefault(json.dumps(row["kept"], sort_keys=True), []).append(row)
    if dense is None or not alike:
        return
    columns = min(2, len(alike))
    height = math.ceil(len(alike) / columns)
    figure = make_figure(f"{dense['inputs']['model']}: what each layer kept at {rate:.0%}", 2.3 * height + 0.3)
    panels = figure.subplots(height, columns, squeeze=False, sharey=True).flatten()
    for axes, same in zip(panels, alike.values(), strict=False):
        for kind, label, color, style in (
            ("channels", "MLP channels", MLP, "-"),
            ("query_heads", "query heads", ATTENTION, "--"),
        ):
            shares = [kept / whole for kept, whole in zip(same[0]["kept"][kind], dense["kept"][kind], strict=True)]
            axes.plot(shares, style, color=color, linewidth=2, drawstyle="steps-mid", label=label)
        width = same[0]["kept"]["hidden_size"] / dense["kept"]["hidden_size"]
        note = f", {width:.0%} of the hidden size" if width < 1 else ""
        style_panel(axes, "; ".join(NAMES[row["method"]] for row in same) + note)
        style_layers(axes, len(shares))
        axes.set_ylim(0, 1.08)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    for axes in panels[len(alike) :]:
        axes.set_visible(False)
    add_shared_legend(figure, panels[0], 2)
    save_figure(figure, path)
