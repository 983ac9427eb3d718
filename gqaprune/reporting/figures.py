"""Draw figures without pyplot or a window: units kept by layer, perplexity by stage, importance of layers."""

import io
import re
from collections.abc import Mapping
from pathlib import Path

import matplotlib
import matplotlib.figure
from matplotlib.ticker import MaxNLocator, PercentFormatter, StrMethodFormatter

from gqaprune.common.atomic_files import write_atomically
from gqaprune.plan import BlockKey, PruningPlan
from gqaprune.reporting.report import Report

_ATTENTION, _MLP = "#3b6fb6", "#d9822b"
_STAGES = {"dense": "#8a8a8a", "pruned": _MLP}
_UNREADABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")
_WIDE = 20.0
"""Ratio of the largest to the smallest perplexity above which the axis is logarithmic."""


def draw_plan(plan: PruningPlan) -> matplotlib.figure.Figure:
    """Draw the units that each layer kept, attention above (query heads if ratios changed) and MLP below."""
    before, after = plan.geometry, plan.pruned_geometry
    layers = range(before.num_layers)
    figure = matplotlib.figure.Figure(figsize=(max(7.0, 0.3 * before.num_layers + 1.5), 6.0), layout="constrained")
    attention = ("Attention: KV heads (one GQA group each)", before.kv_heads, after.kv_heads, _ATTENTION)
    if before.ratios != after.ratios:
        attention = ("Attention: query heads", before.query_heads, after.query_heads, _ATTENTION)
    panels = [attention]
    if any(before.channels):
        panels.append(("MLP: channels", before.channels, after.channels, _MLP))
    rows = figure.subplots(len(panels), 1, sharex=True, squeeze=False)
    for axes, (title, dense, kept, color) in zip(rows[:, 0], panels, strict=True):
        axes.bar(layers, dense, color="#e4e4e4", label="removed", width=0.85)
        axes.bar(layers, kept, color=color, label="kept", width=0.85)
        axes.set_title(f"{title} – {sum(kept) / sum(dense):.1%} kept", loc="left", fontsize=11)
        axes.set_ylim(0, max(dense) * 1.22)
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend(loc="upper right", ncols=2, fontsize=9, frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
        share = axes.twinx()
        share.set_ylim(0, 1.22)
        share.set_yticks([0, 0.25, 0.5, 0.75, 1.0])
        share.yaxis.set_major_formatter(PercentFormatter(1.0))
        share.spines["top"].set_visible(False)
    axes.set_xlabel("decoder layer")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    asked = [f"{plan.rate:.0%}"] if plan.rate or not plan.kv_rate else []
    asked += [f"{plan.kv_rate:.0%} of KV heads"] if plan.kv_rate else []
    title = (
        f"{Path(plan.model).name}: {' and '.join(asked)} asked, {plan.criterion} scores, {plan.allocation} allocation"
    )
    figure.suptitle(make_readable(title), fontsize=12, parse_math=False)
    return figure


def draw_perplexities(report: Report) -> matplotlib.figure.Figure | None:
    """Draw perplexities, with a group of bars per text and a bar per stage; None if none were measured.

    Bars begin at 0; if one is too long for the others to be visible, they begin at 1 on a logarithmic axis.
    """
    groups = {name: {stage.name: stage.perplexity.get(name) for stage in report.stages} for name in _list_texts(report)}
    if any(stage.held_out for stage in report.stages):
        groups["held-out calibration text"] = {stage.name: stage.held_out for stage in report.stages}
    values = [value for group in groups.values() for value in group.values() if value is not None]
    if not values:
        return None
    is_wide = max(values) / min(values) > _WIDE
    stages = [stage.name for stage in report.stages]
    width = 0.8 / len(stages)
    figure = matplotlib.figure.Figure(
        figsize=(max(7.0, 1.2 + 0.62 * len(stages) * len(groups)), 3.2), layout="constrained"
    )
    axes = figure.subplots()
    for number, stage in enumerate(stages):
        known = [(place, group[stage]) for place, group in enumerate(groups.values()) if group[stage] is not None]
        color = _STAGES.get(stage.split(",")[0], _ATTENTION)
        places = [place + (number - (len(stages) - 1) / 2) * width for place, _ in known]
        heights = [value or 0.0 for _, value in known]
        bottom = float(is_wide)
        drawn = axes.bar(places, [v - bottom for v in heights], width * 0.94, bottom, color=color, label=stage)
        axes.bar_label(drawn, [f"{value:,.2f}" for value in heights], padding=2, fontsize=8)
    if is_wide:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.set_ylim(bottom=float(is_wide))
    axes.margins(y=0.12)
    axes.set_xticks(range(len(groups)), [make_readable(name) for name in groups], parse_math=False)
    axes.set_title("perplexity", loc="left", fontsize=11)
    axes.legend(frameon=False, fontsize=9, ncols=len(stages))
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def draw_importance(importance: Mapping[BlockKey, float], method: str) -> matplotlib.figure.Figure:
    """Draw the importance of each layer, separately for attention and MLP if they differ.

    Args:
        importance: importance of every block.
        method: method that measured it, a name in `SENSITIVITIES`.
    """
    kinds = {
        kind: {key.layer: value for key, value in importance.items() if key.kind == kind}
        for kind in ("attention", "mlp")
    }
    attention, mlp = kinds["attention"], kinds["mlp"]
    layers = sorted(attention.keys() | mlp.keys())
    is_of_layers = all(attention.get(layer, mlp.get(layer)) == mlp.get(layer, attention.get(layer)) for layer in layers)
    bars = (
        [("layer", _ATTENTION, attention | mlp)]
        if is_of_layers
        else [("attention", _ATTENTION, attention), ("MLP", _MLP, mlp)]
    )
    figure = matplotlib.figure.Figure(figsize=(max(7.0, 0.3 * len(layers) + 1.5), 3.4), layout="constrained")
    axes = figure.subplots()
    width = 0.85 / len(bars)
    for index, (name, color, values) in enumerate(bars):
        places = [layer + (index - (len(bars) - 1) / 2) * width for layer in values]
        axes.bar(places, list(values.values()), width=width, color=color, label=name)
    axes.set_title(f"Importance by {method}", loc="left", fontsize=11)
    axes.set_xlabel("decoder layer")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.spines[["top", "right"]].set_visible(False)
    if len(bars) > 1:
        axes.legend(ncols=2, fontsize=9, frameon=False)
    return figure


def draw_damages(report: Report) -> matplotlib.figure.Figure | None:
    """Draw the predicted and the measured damage of each layer's cut; None if none was predicted."""
    damages = report.damages
    if not damages:
        return None
    figure = matplotlib.figure.Figure(figsize=(max(7.0, 0.3 * len(damages) + 1.5), 3.4), layout="constrained")
    axes, width = figure.subplots(), 0.42
    left, right = ([damage.layer + side * width / 2 for damage in damages] for side in (-1, 1))
    attention = [damage.attention for damage in damages]
    axes.bar(left, attention, width, color=_ATTENTION, label="attention, predicted")
    axes.bar(left, [damage.mlp for damage in damages], width, attention, color=_MLP, label="MLP, predicted")
    axes.bar(right, [damage.measured or 0.0 for damage in damages], width, color=_STAGES["dense"], label="measured")
    axes.set_title("Damage of each layer's cut, in nats per token", loc="left", fontsize=11)
    axes.set_xlabel("decoder layer")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(ncols=3, fontsize=9, frameon=False)
    return figure


def encode_figure(figure: matplotlib.figure.Figure, format: str = "png") -> bytes:
    """Encode a figure as `png`, or as `svg` without background; equal figures have equal bytes."""
    picture = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "gqaprune"}):
        is_svg = format == "svg"
        figure.savefig(picture, format=format, dpi=120, metadata={"Date": None} if is_svg else None, transparent=is_svg)
    return picture.getvalue()


def save_figure(figure: matplotlib.figure.Figure, path: Path) -> None:
    """Write a figure as PNG, atomically."""
    write_atomically(path, encode_figure(figure))


def make_readable(text: str) -> str:
    """Replace control characters and halves of characters, which neither fonts nor files support."""
    return _UNREADABLE.sub("�", text)


def _list_texts(report: Report) -> list[str]:
    return list(dict.fromkeys(name for stage in report.stages for name in stage.perplexity))
