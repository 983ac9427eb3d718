"""How the cost of pruning grows: scoring and repair against layers, width and tokens.

    OMP_NUM_THREADS=1 python benchmarks/growth.py

Llamas of random weights; one size grows at a time, the others stay those of `BASE`. MLPs are three times as wide as the
model, heads have 64 features, two of them share a KV head. All layers lose 20 % of their parameters in channels.
"""

import argparse
import copy
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import linear_regression, median

import torch
from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator
from measuring import describe_machine, make_model, make_tokens
from quality_report import format_table, splice
from transformers import LlamaConfig

import gqaprune
from gqaprune.commands.speed import read_clock
from gqaprune.common.console import console
from gqaprune.models.architecture import find_blocks
from gqaprune.reporting.charts import SERIES, make_figure, save_figure, style_panel
from gqaprune.scoring.scores import score_units
from gqaprune.surgery.repair import apply_plan_with_repair

HERE = Path(__file__).parent
BEGIN, END = "<!-- growth:begin -->", "<!-- growth:end -->"


@dataclass(frozen=True)
class Size:
    """How large a model is, and how much text it reads.

    Args:
        layers: decoder layers.
        width: of the residual stream, a multiple of 128.
        tokens: of calibration text, a multiple of `WINDOW`.
    """

    layers: int
    width: int
    tokens: int


BASE = Size(layers=2, width=256, tokens=2048)
GROWTH: Mapping[str, Sequence[int]] = {
    "layers": (2, 4, 8, 16),
    "width": (128, 256, 512, 1024),
    "tokens": (1024, 2048, 4096, 8192, 16384),
}
WINDOW = 128
CRITERIA = ("fisher", "obs")
REPAIRS = {"least squares": 0, "least squares and refinement": gqaprune.PruningConfig().repair.epochs}
"""Name -> `repair.epochs`."""
Seconds = dict[str, float]
"""By part of the work."""
Points = dict[str, list[tuple[int, Seconds]]]
"""What grows -> its sizes, ascending, and their seconds."""


def measure_seconds(work: Callable[[], object]) -> float:
    """Seconds of a call."""
    start = read_clock("cpu")
    work()
    return read_clock("cpu") - start


def measure_size(size: Size) -> Seconds:
    """Score, cut and repair a model of a size."""
    config = LlamaConfig(
        hidden_size=size.width,
        intermediate_size=3 * size.width,
        num_hidden_layers=size.layers,
        num_attention_heads=size.width // 64,
        num_key_value_heads=size.width // 128,
        vocab_size=256,
    )
    model = make_model(config, torch.float32, "cpu")
    batches = make_tokens(config, size.tokens // WINDOW, WINDOW).split(1)
    whole = (0, size.layers)
    settings = gqaprune.PruningConfig(
        criterion="l2",
        allocation="uniform",
        repair={"method": "none"},
        limits={"attention_layers": whole, "mlp_layers": whole},
    )
    plan, _ = gqaprune.prune(copy.deepcopy(model), [], settings)
    seconds = {}
    for criterion in CRITERIA:
        blocks = find_blocks(model)
        seconds[f"scores of {criterion}"] = measure_seconds(lambda: score_units(model, blocks, batches, criterion))  # noqa: B023
    for name, epochs in REPAIRS.items():
        repair = replace(settings, repair={"method": "least_squares", "epochs": epochs}).repair
        cut = copy.deepcopy(model)
        seconds[name] = measure_seconds(lambda: apply_plan_with_repair(cut, plan, batches, repair))  # noqa: B023
    return seconds


def measure(base: Size, growth: Mapping[str, Sequence[int]], turns: int) -> Points:
    """Medians of several turns over all sizes, after one of the base that warms up."""
    measure_size(base)
    sizes = [replace(base, **{axis: value}) for axis, values in growth.items() for value in values]
    runs: dict[Size, list[Seconds]] = {size: [] for size in sizes}
    for turn in range(turns):
        for size in runs:
            runs[size].append(measure_size(size))
            found = ", ".join(f"{part} {seconds:.2f} s" for part, seconds in runs[size][-1].items())
            print(f"turn {turn + 1}, {size}: {found}", flush=True)
    medians = {size: {part: median(each[part] for each in own) for part in own[0]} for size, own in runs.items()}
    return {axis: [(v, medians[replace(base, **{axis: v})]) for v in values] for axis, values in growth.items()}


def fit_exponent(sizes: Sequence[float], seconds: Sequence[float]) -> float:
    """The power of a size that seconds grow with: slope of a straight line through their logarithms."""
    return linear_regression([math.log(size) for size in sizes], [math.log(value) for value in seconds]).slope


def fit_all(points: Points) -> dict[str, Seconds]:
    """What grows -> part of the work -> exponent."""
    return {
        axis: {part: fit_exponent([v for v, _ in own], [s[part] for _, s in own]) for part in own[0][1]}
        for axis, own in points.items()
    }


def describe(points: Points, base: Size, turns: int) -> str:
    """The table, as Markdown."""
    exponents = fit_all(points)
    header = ["exponent (seconds)", *(f"{axis}, {own[0][0]:,} to {own[-1][0]:,}" for axis, own in points.items())]
    lines = []
    for part in next(iter(exponents.values())):
        ends = {axis: (own[0][1][part], own[-1][1][part]) for axis, own in points.items()}
        lines.append(
            [
                part,
                *(f"{exponents[axis][part]:.2f} ({first:.2f} to {last:.2f})" for axis, (first, last) in ends.items()),
            ]
        )
    held = ", ".join(
        f"{value:,} {name}" if name != "width" else f"width {value}" for name, value in asdict(base).items()
    )
    about = (
        f"Random Llamas in float32, windows of {WINDOW} tokens; what does not grow: {held}. Medians of "
        f"{turns} turns; exponents are slopes of log seconds on log size. {describe_machine('cpu')}."
    )
    return "\n".join([about, "", *format_table(header, lines)])


def draw(points: Points, path: Path) -> None:
    """Draw seconds by size, with a panel for what grows, and a mark and a fitted line for each part of the work."""
    exponents = fit_all(points)
    height = math.ceil((len(points) + 1) / 2)
    figure = make_figure("How the cost of pruning grows", 2.7 * height)
    panels = figure.subplots(height, 2, squeeze=False).flatten()
    for axes, (axis, own) in zip(panels, points.items(), strict=False):
        sizes = [value for value, _ in own]
        for index, (part, exponent) in enumerate(exponents[axis].items()):
            seconds = [each[part] for _, each in own]
            middle = [math.exp(sum(map(math.log, values)) / len(values)) for values in (sizes, seconds)]
            line = [middle[1] * (size / middle[0]) ** exponent for size in sizes]
            label = f"{part}:\n{', '.join(f'{found[part]:.2f}' for found in exponents.values())}"
            axes.plot(sizes, seconds, "os^D"[index % 4], color=SERIES[index], markersize=6, label=label)
            axes.plot(sizes, line, color=SERIES[index], linewidth=1)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xticks(sizes, [f"{size // 1024}k" if size >= 1024 else f"{size}" for size in sizes])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        style_panel(axes, x=axis, y="seconds")
    for axes in panels[len(points) :]:
        axes.axis("off")
    handles, labels = panels[0].get_legend_handles_labels()
    title = f"fitted exponents of\n{', '.join(points)}"
    panels[len(points)].legend(
        handles, labels, title=title, loc="center", frameon=False, fontsize=11, title_fontsize=11
    )
    save_figure(figure, path)


def main() -> int:
    """Measure, print, draw, and write the table into results/large_models.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--results", type=Path, default=HERE / "results/large_models.md")
    parser.add_argument("--images", type=Path, default=HERE.parent / "docs" / "images")
    options = parser.parse_args()
    console.quiet = True
    points = measure(BASE, GROWTH, options.turns)
    table = describe(points, BASE, options.turns)
    print(table)
    draw(points, options.images / "growth.png")
    splice(options.results, f"{BEGIN}\n\n{table}\n\n{END}", BEGIN, END, "How the cost of pruning grows")
    return 0


if __name__ == "__main__":
    sys.exit(main())
