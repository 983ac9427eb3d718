"""Draw figures without pyplot or a window: units kept by layer, perplexity by stage, importance of layers."""

from collections.abc import Mapping

import matplotlib.figure
from matplotlib.ticker import StrMethodFormatter

from gqaprune.plan import BlockKey, PruningPlan
from gqaprune.reporting.charts import (
    ATTENTION,
    DENSE,
    MLP,
    REMOVED,
    WIDTH,
    add_legend,
    add_shared_legend,
    draw_bars,
    is_wide,
    make_figure,
    name_model,
    style_layers,
    style_panel,
)
from gqaprune.reporting.report import Report

_STAGES = {"dense": DENSE, "pruned": MLP}


def draw_plan(plan: PruningPlan, width: float = WIDTH) -> matplotlib.figure.Figure:
    """Draw the units that each layer kept, with a panel for every kind of unit that was cut.

    Query heads have a panel only if some went without their KV head. If nothing was cut, every kind has a panel.
    """
    kinds = _list_kinds(plan)
    cut = {kind: counts for kind, counts in kinds.items() if sum(counts[1]) < sum(counts[0])} or kinds
    figure = make_figure(_describe_rates(plan), 2.25 * len(cut) + 0.25, width)
    panels = figure.subplots(len(cut), 1, sharex=True, squeeze=False)[:, 0]
    layers = range(plan.geometry.num_layers)
    for axes, (kind, (dense, kept)) in zip(panels, cut.items(), strict=True):
        color = MLP if kind == "MLP channels" else ATTENTION
        axes.bar(layers, kept, color=color, label="kept", width=0.85)
        removed = [whole - left for whole, left in zip(dense, kept, strict=True)]
        axes.bar(layers, removed, bottom=kept, color=REMOVED, label="removed", width=0.85)
        whole = [name for name in kinds if name not in cut] if axes is panels[-1] else []
        totals = f"{kind[0].upper()}{kind[1:]}: {sum(kept):,} of {sum(dense):,} kept"
        style_panel(axes, "; ".join([totals, *(f"all {sum(kinds[name][0]):,} {name} kept" for name in whole)]))
        axes.set_ylim(0, max(dense) * 1.25)
        axes.set_yticks(_divide(max(dense)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        add_legend(axes, 2)
    style_layers(panels[-1], plan.geometry.num_layers)
    return figure


def _list_kinds(plan: PruningPlan) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    """List the counts of every layer, dense and kept, by kind of unit."""
    before, after = plan.geometry, plan.pruned_geometry
    kinds = {"KV heads": (before.kv_heads, after.kv_heads)}
    if before.ratios != after.ratios:
        kinds = {"query heads": (before.query_heads, after.query_heads)} | kinds
    if any(before.channels):
        kinds["MLP channels"] = before.channels, after.channels
    return kinds


def _describe_rates(plan: PruningPlan) -> str:
    name = name_model(plan.model)
    if plan.removes_nothing:
        return f"{name}: nothing removed"
    targets = {"parameters": plan.rate, "KV heads": plan.kv_rate}
    asked = [f"−{rate:.0%} {what}" for what, rate in targets.items() if rate]
    return f"{name}, target: {', '.join(asked)}" if asked else f"{name}, pruned by a given plan"


def _divide(count: int) -> list[int]:
    """Divide a count into 4, 3, 2 or 1 equal parts, and small ones into single units."""
    parts = count if count <= 4 else next(parts for parts in (4, 3, 2, 1) if count % parts == 0)
    return [count * part // parts for part in range(parts + 1)]


def draw_perplexities(report: Report, width: float = WIDTH) -> matplotlib.figure.Figure | None:
    """Draw perplexities, with a panel per text and a bar per stage that measured it; None if none were measured.

    Bars begin at 0; if one is too long for the others to be visible, they begin at 1 on a logarithmic axis.
    """
    names = dict.fromkeys(name for stage in report.stages for name in stage.perplexity)
    groups = {name: [(stage.name, stage.perplexity.get(name)) for stage in report.stages] for name in names}
    groups["held-out calibration text"] = [(stage.name, stage.held_out) for stage in report.stages]
    bars = {
        name: [(stage, value, _STAGES.get(stage.split(",")[0], ATTENTION)) for stage, value in group if value]
        for name, group in groups.items()
    }
    bars = {name: group for name, group in bars.items() if group}
    if not bars:
        return None
    is_logarithmic = is_wide([value for group in bars.values() for _, value, _ in group])
    scale = "logarithmic, lower is better" if is_logarithmic else "lower is better"
    heights = [0.27 * len(group) + 0.3 for group in bars.values()]
    figure = make_figure(f"Perplexity ({scale})", sum(heights), width)
    panels = figure.subplots(len(bars), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    for axes, (name, group) in zip(panels, bars.items(), strict=True):
        draw_bars(axes, name, group, "{:,.2f}", is_logarithmic)
    return figure


def draw_importance(
    importance: Mapping[BlockKey, float], method: str, width: float = WIDTH
) -> matplotlib.figure.Figure:
    """Draw the importance of each layer, separately for attention and MLP if they differ.

    Args:
        importance: importance of every block.
        method: method that measured it, a name in `SENSITIVITIES`.
        width: width of the figure in inches.
    """
    kinds = {
        kind: {key.layer: value for key, value in importance.items() if key.kind == kind}
        for kind in ("attention", "mlp")
    }
    attention, mlp = kinds["attention"], kinds["mlp"]
    layers = sorted(attention.keys() | mlp.keys())
    is_of_layers = all(attention.get(layer, mlp.get(layer)) == mlp.get(layer, attention.get(layer)) for layer in layers)
    bars = (
        [("layer", ATTENTION, attention | mlp)]
        if is_of_layers
        else [("attention", ATTENTION, attention), ("MLP", MLP, mlp)]
    )
    figure = make_figure(f"Importance of each layer, by {method}", 2.8, width)
    axes = figure.subplots()
    thickness = 0.85 / len(bars)
    for index, (name, color, values) in enumerate(bars):
        places = [layer + (index - (len(bars) - 1) / 2) * thickness for layer in values]
        axes.bar(places, list(values.values()), width=thickness, color=color, label=name)
    style_panel(axes)
    style_layers(axes, max(layers) + 1)
    if len(bars) > 1:
        add_shared_legend(figure, axes, 2)
    return figure


def draw_damages(report: Report, width: float = WIDTH) -> matplotlib.figure.Figure | None:
    """Draw the predicted and the measured damage of each layer's cut; None if none was predicted."""
    damages = report.damages
    if not damages:
        return None
    figure = make_figure("Damage of each layer's cut, in nats per token", 3.0, width)
    axes, thickness = figure.subplots(), 0.42
    left, right = ([damage.layer + side * thickness / 2 for damage in damages] for side in (-1, 1))
    attention = [damage.attention for damage in damages]
    axes.bar(left, attention, thickness, color=ATTENTION, label="attention, predicted")
    axes.bar(left, [damage.mlp for damage in damages], thickness, attention, color=MLP, label="MLP, predicted")
    axes.bar(right, [damage.measured or 0.0 for damage in damages], thickness, color=DENSE, label="measured")
    style_panel(axes)
    style_layers(axes, max(damage.layer for damage in damages) + 1)
    axes.set_xlim(left=min(damage.layer for damage in damages) - 0.6)
    add_shared_legend(figure, axes, 3 if width >= WIDTH else 2)
    return figure
