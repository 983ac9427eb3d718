"""Tables and figures of the recovery rows, from their JSON alone."""

import math
import sys
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from matplotlib.lines import Line2D
from quality_report import format_table, splice
from rich.console import Console
from rich.table import Table

from gqaprune.reporting.charts import DENSE, SERIES, add_shared_legend, make_figure, save_figure, style_panel

Row = Mapping[str, Any]
Lines = tuple[list[str], list[list[str]]]

BEGIN, END = "<!-- recovery:begin -->", "<!-- recovery:end -->"
"""Markers in results/recovery.md; what is between them is written here."""
PRODUCTS = {"bf16-mixed": "bfloat16", "32-true": "float32"}
"""Lightning's precision -> the type that matrix products are made in."""


def is_sweep(row: Row) -> bool:
    """Whether a row chooses a learning rate."""
    return bool(row["inputs"]["row"].get("sweep"))


def find_row(rows: Sequence[Row], name: str) -> Row | None:
    """The row of a name, if it was measured."""
    return next((row for row in rows if row["name"] == name and "points" in row), None)


def compute_gap(perplexity: Mapping[str, float], dense: Mapping[str, float]) -> dict[str, float]:
    """Log gap `ln(perplexity / dense perplexity)` of every text."""
    return {name: math.log(value / dense[name]) for name, value in perplexity.items()}


def build_points(rows: Sequence[Row]) -> Lines:
    """Perplexity and gap to the untouched dense model of every row after so many tokens, the dense one first."""
    header = ["trained", "text", "rate", "products", "tokens/s", "peak RSS", "tokens", "minutes"]
    dense = find_row(rows, "dense")
    if dense is None:
        return header, []
    untouched, alike = dense["points"][0]["perplexity"], dense["points"][-1]
    header += [*untouched, "gap to dense trained alike"]
    lines = []
    for row in [dense, *(row for row in rows if row is not dense and not is_sweep(row))]:
        if "points" not in row:
            lines.append([row["name"], f"failed: {row.get('error', '')}".replace("|", "/"), *[""] * (len(header) - 2)])
            continue
        settings, last = row["inputs"]["row"], row["points"][-1]
        for point in row["points"]:
            gaps = compute_gap(point["perplexity"], untouched)
            first = point is row["points"][0]
            speed = f"{last['tokens'] / last['seconds']:.0f}" if last["seconds"] else ""
            about = [row["name"], settings.get("text", "train"), f"{settings['rate']:g}"]
            about += [PRODUCTS[row["inputs"]["training"]["precision"]], speed]
            about.append(f"{row['peak_rss'] / 2**30:.1f} GiB")
            measured = [f"{value:.2f} ({gaps[name]:+.3f})" for name, value in point["perplexity"].items()]
            to_alike = compute_gap(point["perplexity"], alike["perplexity"]) if point["point"] == alike["point"] else {}
            lines.append(
                [
                    *(about if first else [""] * len(about)),
                    f"{point['point']:,}",
                    f"{point['seconds'] / 60:.1f}",
                    *measured,
                    f"{next(iter(to_alike.values())):+.3f}" if to_alike and row is not dense else "",
                ]
            )
    return header, lines


def build_sweep(rows: Sequence[Row]) -> Lines:
    """Perplexity on validation text by recipe and learning rate, and the mean of its logarithms, lowest in bold."""
    sweeps = [row for row in rows if is_sweep(row) and "points" in row]
    header = ["recipe", "rate", *(sweeps[0]["points"][0]["perplexity"] if sweeps else []), "mean log"]
    lines = []
    for recipe in dict.fromkeys(map(_name_recipe, sweeps)):
        of_recipe = [row for row in sweeps if _name_recipe(row) == recipe]
        best = min(_mean_log(row) for row in of_recipe)
        for row in sorted(of_recipe, key=lambda row: row["inputs"]["row"]["rate"]):
            mean = _mean_log(row)
            values = [f"{value:.2f}" for value in row["points"][-1]["perplexity"].values()]
            shown = f"**{mean:.4f}**" if mean == best else f"{mean:.4f}"
            lines.append([recipe, f"{row['inputs']['row']['rate']:g}", *values, shown])
    return header, lines


def describe(rows: Sequence[Row]) -> str:
    """How the rows were trained and measured, in words, from what they say."""
    if not rows:
        return "No row has been run yet."
    inputs = next((row for row in rows if not is_sweep(row)), rows[0])["inputs"]
    training, versions = inputs["training"], inputs["versions"]
    return (
        f"{inputs['model']}, pruned by 20 % as quality.py's `default` row, unless it says dense. Training: windows of "
        f"{training['window']} tokens, {training['batch']} per step, AdamW, cosine to 0 at {training['tokens']:,} "
        "tokens, 5 % warm-up, float32 weights and moments. "
        f"Perplexity in float32, windows of {inputs['protocol']['window']:,} tokens, token-weighted; in brackets the "
        f"log gap to the untouched dense model. The last column is the first text's gap to the dense model that was "
        f"given the same tokens. torch {versions['torch']}, lightning {versions['lightning']}, transformers "
        f"{versions['transformers']}, peft {versions['peft']}."
    )


def print_tables(rows: Sequence[Row], console: Console | None = None) -> None:
    """Both tables on the console."""
    console = console or (Console() if sys.stdout.isatty() else Console(width=180))
    for title, (header, lines) in (("Recovery", build_points(rows)), ("Learning rates", build_sweep(rows))):
        table = Table(title=title, title_justify="left")
        for name in header:
            table.add_column(name, justify="right")
        for line in lines:
            table.add_row(*line)
        console.print(table)
    console.print(describe(rows), style="dim")


def write_markdown(rows: Sequence[Row], path: Path) -> None:
    """Write the tables between the markers of a Markdown file; at its end, with markers, if it has none yet.

    Raises:
        ValueError: if the file has one marker without the other.
    """
    parts = [BEGIN, "", describe(rows), ""]
    sweep = "Learning rates, 50,000 tokens: validation text decides"
    for title, (header, lines) in (("", build_points(rows)), (sweep, build_sweep(rows))):
        if lines:
            parts += [f"### {title}", ""] if title else []
            parts += [*format_table(header, lines), ""]
    splice(path, "\n".join([*parts, END]), BEGIN, END, "Recovery")


def draw_points(rows: Sequence[Row], path: Path) -> None:
    """Draw the gap to the untouched dense model by tokens, with a panel per text and a line per row.

    Rows that differ in their text alone share a colour; those trained on text that the model wrote are dashed.
    """
    dense = find_row(rows, "dense")
    chosen = [row for row in rows if not is_sweep(row) and "points" in row]
    if dense is None or not chosen:
        return
    untouched = dense["points"][0]["perplexity"]
    height = math.ceil((len(untouched) + 1) / 2)
    figure = make_figure(f"{dense['inputs']['model']}: recovery by training", 2.5 * height)
    panels = figure.subplots(height, 2, squeeze=False).flatten()
    pruned = (find_row(rows, "full") or dense)["points"][:1]  # which rows of the pruned model share
    modes = sorted({_name_mode(row) for row in chosen}, key=lambda mode: (mode != "dense", mode))
    colors = dict(zip(modes, cycle((SERIES[-1], *SERIES[:-1])), strict=False))
    for axes, text in zip(panels, untouched, strict=False):
        for row in chosen:
            points = row["points"] if row["points"][0]["tokens"] == 0 else pruned + row["points"]
            tokens = [point["tokens"] / 1000 for point in points]
            gaps = [compute_gap(point["perplexity"], untouched)[text] for point in points]
            style = "-" if _name_mode(row) == row["name"] else "--"
            axes.plot(tokens, gaps, f"o{style}", color=colors[_name_mode(row)], markersize=4)
        axes.axhline(0, color=DENSE, linewidth=0.8)
        style_panel(axes, text, "thousand tokens", "log gap to dense")
    for axes in panels[len(untouched) :]:
        axes.axis("off")
    handles = [Line2D([], [], color=color, marker="o", label=mode) for mode, color in colors.items()]
    if any(_name_mode(row) != row["name"] for row in chosen):
        handles.append(Line2D([], [], color=DENSE, linestyle="--", label="on sampled text"))
    panels[len(untouched)].legend(handles=handles, loc="center", frameon=False, fontsize=11)
    save_figure(figure, path)


def _name_mode(row: Row) -> str:
    """What a row is besides its text: rows that differ in it alone share a colour."""
    return str(row["name"]).removesuffix(", sampled text")


def draw_sweep(rows: Sequence[Row], path: Path) -> None:
    """Draw the mean log-perplexity of the validation texts by learning rate, with a line per recipe."""
    sweeps = [row for row in rows if is_sweep(row) and "points" in row]
    if not sweeps:
        return
    figure = make_figure("Validation perplexity by learning rate", 4.2)
    axes = figure.subplots()
    for recipe, color in zip(dict.fromkeys(map(_name_recipe, sweeps)), cycle(SERIES), strict=False):
        points = sorted((r["inputs"]["row"]["rate"], _mean_log(r)) for r in sweeps if _name_recipe(r) == recipe)
        axes.plot(*zip(*points, strict=True), "o-", color=color, label=recipe)
    axes.set_xscale("log")
    style_panel(axes, x="learning rate", y="mean log-perplexity")
    add_shared_legend(figure, axes, 3)
    save_figure(figure, path)


def _name_recipe(row: Row) -> str:
    """What a row of the sweep trains by: its name between `sweep` and the rate."""
    return str(row["name"]).removeprefix("sweep ").rpartition(" ")[0]


def _mean_log(row: Row) -> float:
    values = row["points"][-1]["perplexity"].values()
    return sum(map(math.log, values)) / len(values)
