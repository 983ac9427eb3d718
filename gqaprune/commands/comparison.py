"""Results of `compare`: as data, as a table with changes from the first model, and as a figure."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import matplotlib.figure
from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter
from rich.table import Table

from gqaprune.commands.inspect import show_range
from gqaprune.commands.tasks import Score
from gqaprune.geometry import Geometry
from gqaprune.planning.memory import find_range
from gqaprune.reporting.charts import (
    DENSE,
    SERIES,
    add_legend,
    draw_bars,
    is_wide,
    make_figure,
    style_layers,
    style_panel,
)
from gqaprune.reporting.report import Stage, show_change

OTHER_TOKENIZER = (
    "* its tokenizer differs from the first model's: bits per byte are comparable with the first model's, perplexities "
    "per token are not"
)


NOISE = "~ no clear difference from the first model: the ranges of both over their turns overlap"


@dataclass(frozen=True)
class Speed:
    """Speed and peak memory of a model.

    Args:
        prefill: tokens of the prompt per second.
        decode: generated tokens per second.
        peak_bytes: peak memory, weights included; None if the machine does not report it.
        prefill_range: slowest and fastest turn of the prompt, in tokens per second.
        decode_range: slowest and fastest turn of the generated tokens, in tokens per second.
    """

    prefill: float
    decode: float
    peak_bytes: int | None = None
    prefill_range: tuple[float, float] | None = None
    decode_range: tuple[float, float] | None = None


@dataclass(frozen=True)
class Subject:
    """One of the models compared.

    Args:
        model: folder, file or name, as the user wrote it.
        dtype: type of the weights in memory.
        geometry: shapes of its layers.
        stage: its counts, size on disk (`weight_bytes`) and perplexities by corpus; its name is the column's title.
        tokens: number of tokens of each corpus's text with its own tokenizer.
        bits_per_byte: its loss in bits per byte of that text, by corpus.
        has_other_tokenizer: whether its tokens of that text differ from the first model's.
        speed: speed and memory; None if they were not measured.
        scores: scores by task and metric.
    """

    model: str
    dtype: str
    geometry: Geometry
    stage: Stage
    tokens: Mapping[str, int] = field(default_factory=dict)
    bits_per_byte: Mapping[str, float] = field(default_factory=dict)
    has_other_tokenizer: bool = False
    speed: Speed | None = None
    scores: Mapping[str, Score] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain types, as JSON has them."""
        counts, shapes = asdict(self.stage), self.geometry
        layers = zip(shapes.query_heads, shapes.kv_heads, shapes.channels, strict=True)
        return {
            "model": self.model,
            "name": counts.pop("name"),
            "family": shapes.family,
            "dtype": self.dtype,
            "disk_bytes": counts.pop("weight_bytes"),
            **counts,
            "bits_per_byte": dict(self.bits_per_byte),
            "tokens": dict(self.tokens),
            "has_other_tokenizer": self.has_other_tokenizer,
            "speed": None if self.speed is None else asdict(self.speed),
            "tasks": {label: asdict(score) for label, score in self.scores.items()},
            "layers": [{"query_heads": query, "kv_heads": kv, "channels": width} for query, kv, width in layers],
        }

    def count_differing_layers(self, first: "Subject") -> int:
        """Count the layers whose shapes differ from another model's, and those that only one of the models has."""
        mine, other = (
            list(zip(shapes.query_heads, shapes.kv_heads, shapes.channels, strict=True))
            for shapes in (self.geometry, first.geometry)
        )
        return sum(a != b for a, b in zip(mine, other, strict=False)) + abs(len(mine) - len(other))


@dataclass(frozen=True)
class Comparison:
    """Models side by side; the others are compared with the first.

    Args:
        subjects: the models.
        text_bytes: bytes of each corpus's text, the same for all models.
        protocol: descriptions of how each quantity was measured.
    """

    subjects: tuple[Subject, ...]
    text_bytes: Mapping[str, int]
    protocol: tuple[str, ...]

    @property
    def has_several_tokenizers(self) -> bool:
        """Whether tokenizers differ, so that perplexities per token are not comparable."""
        return any(subject.has_other_tokenizer for subject in self.subjects)

    def to_dict(self) -> dict[str, Any]:
        """Plain types, as JSON has them."""
        return {
            "protocol": list(self.protocol),
            "text_bytes": dict(self.text_bytes),
            "has_several_tokenizers": self.has_several_tokenizers,
            "models": [subject.to_dict() for subject in self.subjects],
        }


def build_comparison_table(comparison: Comparison) -> Table:
    """Build a table with one row per quantity and one column per model, with the change from the first model."""
    subjects, first = comparison.subjects, comparison.subjects[0]
    notes = [*comparison.protocol, *([OTHER_TOKENIZER] if comparison.has_several_tokenizers else [])]
    if any(_is_noise(one.speed, first.speed, name) for one in subjects[1:] for name in ("prefill", "decode")):
        notes.append(NOISE)
    table = Table(caption="\n".join(notes) or None, caption_style="dim", caption_justify="left")
    table.add_column("", no_wrap=True)
    for subject in subjects:
        table.add_column(subject.stage.name, justify="right", overflow="fold")

    def add_row(label: str, pattern: str, values: Sequence[float | None]) -> None:
        cells = ("–" if v is None else pattern.format(v) + _show_change(v, values[0]) for v in values)
        table.add_row(label, *cells)

    stages = [subject.stage for subject in subjects]
    add_row("parameters", "{:,.2f} M", [stage.parameters / 1e6 for stage in stages])
    add_row("decoder parameters", "{:,.2f} M", [stage.decoder_parameters / 1e6 for stage in stages])
    table.add_row("type in memory", *(subject.dtype for subject in subjects))
    add_row("size on disk", "{:,.1f} MB", [stage.weight_bytes / 1e6 for stage in stages])
    add_row("KV-cache bytes/token", "{:,.0f}", [stage.kv_cache_bytes_per_token for stage in stages])
    for corpus in comparison.text_bytes:
        table.add_row(f"ppl {corpus}", *(_show_perplexity(subject, first, corpus) for subject in subjects))
        add_row(f"bits/byte {corpus}", "{:.4f}", [subject.bits_per_byte[corpus] for subject in subjects])
    speeds = [subject.speed for subject in subjects if subject.speed is not None]
    if speeds:
        for name in ("prefill", "decode"):
            table.add_row(f"{name} tokens/s", *(_show_speed(speed, speeds[0], name) for speed in speeds))
        peaks = [speed.peak_bytes for speed in speeds]
        add_row("peak memory", "{:,.1f} MB", [None if peak is None else peak / 1e6 for peak in peaks])
    for label in first.scores:
        table.add_row(label, *(_show_score(subject.scores[label], first.scores[label]) for subject in subjects))
    shapes = [subject.geometry for subject in subjects]
    table.add_row("layers", *(str(geometry.num_layers) for geometry in shapes))
    heads = ([show_range(find_range(counts)) for counts in (g.query_heads, g.kv_heads)] for g in shapes)
    table.add_row("query heads : KV heads", *(" : ".join(pair) for pair in heads))
    table.add_row("MLP channels", *(show_range(find_range(geometry.channels)) for geometry in shapes))
    table.add_row("layers that differ", "", *(str(subject.count_differing_layers(first)) for subject in subjects[1:]))
    return table


def draw_comparison(comparison: Comparison) -> matplotlib.figure.Figure:
    """Draw the layers' heads and channels as shares of the first model's where they differ, text results and size."""
    subjects, first = comparison.subjects, comparison.subjects[0]
    shapes = {"KV heads": "kv_heads", "MLP channels": "channels"}
    if any(subject.geometry.ratios != first.geometry.ratios for subject in subjects):  # else KV heads say it all
        shapes = {"query heads": "query_heads"} | shapes
    shapes = {
        kind: name
        for kind, name in shapes.items()
        if any(getattr(subject.geometry, name) != getattr(first.geometry, name) for subject in subjects)
    }
    bars = _list_bars(comparison)
    names = [subject.stage.name for subject in subjects]
    heights = [2.0] * len(shapes) + [0.27 * len(subjects) + 0.35] * len(bars)
    figure = make_figure(f"{', '.join(names[1:])} beside {names[0]}", sum(heights) + 0.6)
    panels = figure.subplots(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, (kind, name) in zip(panels, shapes.items(), strict=False):
        _draw_shares(axes, comparison, kind, name)
    if shapes:
        panels[0].set_ylim(top=panels[0].get_ylim()[1] * (1.1 + 0.12 * len(subjects)))  # room for the names
        add_legend(panels[0], 2)
    for axes, (title, (values, pattern)) in zip(panels[len(shapes) :], bars.items(), strict=True):
        rows = [
            (name, value, _pick_color(index)) for index, (name, value) in enumerate(zip(names, values, strict=True))
        ]
        draw_bars(axes, title, rows, pattern, min(values) > 1 and is_wide(values))
    return figure


def _list_bars(comparison: Comparison) -> dict[str, tuple[list[float], str]]:
    """List what is drawn as bars: a title, the models' values and their format.

    Texts have perplexities, or bits per byte if tokenizers differ.
    """
    subjects = comparison.subjects
    bars: dict[str, tuple[list[float], str]] = {}
    for corpus in comparison.text_bytes:
        if comparison.has_several_tokenizers:
            title, pattern = f"bits per byte on {corpus} (tokenizers differ), lower is better", "{:.3f}"
            bars[title] = [subject.bits_per_byte[corpus] for subject in subjects], pattern
        else:
            title = f"perplexity on {corpus}, lower is better"
            bars[title] = [subject.stage.perplexity[corpus] for subject in subjects], "{:,.2f}"
    bars["size on disk, MB"] = [subject.stage.weight_bytes / 1e6 for subject in subjects], "{:,.0f}"
    return bars


def _draw_shares(axes: Axes, comparison: Comparison, kind: str, name: str) -> None:
    counts = [getattr(subject.geometry, name) for subject in comparison.subjects]
    for index, subject in enumerate(comparison.subjects):
        shares = [count / dense if dense else 0.0 for count, dense in zip(counts[index], counts[0], strict=False)]
        thickness = 1.5 + 1.5 * (len(counts) - 1 - index)  # so that overlapping lines are all visible
        axes.plot(
            shares, drawstyle="steps-mid", linewidth=thickness, color=_pick_color(index), label=subject.stage.name
        )
    first, *others = map(sum, counts)
    relation = "of" if max(others) <= first else "beside"
    totals = f"{' and '.join(f'{total:,}' for total in others)} {relation} {first:,}"
    style_panel(axes, f"{kind[0].upper()}{kind[1:]}: {totals}")
    style_layers(axes, max(map(len, counts)))
    axes.set_ylim(0, max(1.1, axes.get_ylim()[1]))
    axes.set_yticks([0.0, 0.5, 1.0])
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))


def _pick_color(index: int) -> str:
    return DENSE if index == 0 else SERIES[(index - 1) % len(SERIES)]


def _show_change(value: float, first: float | None) -> str:
    return show_change(value, first) if first else ""


def _is_noise(speed: Speed | None, first: Speed | None, name: str) -> bool:
    """Return whether the speeds of two models overlap over their turns."""
    if speed is None or first is None or speed is first:
        return False
    mine, other = (getattr(one, f"{name}_range") for one in (speed, first))
    return mine is not None and other is not None and mine[0] <= other[1] and other[0] <= mine[1]


def _show_speed(speed: Speed, first: Speed, name: str) -> str:
    value, base = getattr(speed, name), getattr(first, name)
    return f"{value:,.1f}" + (" ~" if _is_noise(speed, first, name) else show_change(value, base))


def _show_perplexity(subject: Subject, first: Subject, corpus: str) -> str:
    value = subject.stage.perplexity[corpus]
    if subject.has_other_tokenizer:
        return f"{value:.2f} *"
    return f"{value:.2f}" + _show_change(value, first.stage.perplexity[corpus])


def _show_score(score: Score, first: Score) -> str:
    error = "" if score.error is None else f" ± {score.error:.4f}"
    change = "" if score.value == first.value else f" ({score.value - first.value:+.4f})"
    return f"{score.value:.4f}{error}{change}"
