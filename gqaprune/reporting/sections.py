"""Prepare the sections of `report.html` as plain data: sentences, tables and pictures; None for an empty section.

`describe_x` returns the arguments of the macro `x`, which draws the section, in `templates/sections.html`.
"""

import base64
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Any

import matplotlib.figure

from gqaprune.plan import BlockKey, PruningPlan
from gqaprune.reporting.charts import encode_figure
from gqaprune.reporting.figures import draw_damages, draw_importance, draw_perplexities, draw_plan
from gqaprune.reporting.report import Report, list_rows

Facts = dict[str, Any]
"""Arguments of the macro that draws a section."""

_WIDTHS = {"wide": 10.5, "narrow": 4.2}
"""Width in inches of the figures that a wide screen and a phone show, with text as large as the page's."""
_MARKS = {"fine": "✓", "degraded": "!", "broken": "✗"}
"""Marks that are in basic fonts, because a machine may have no others."""


@dataclass(frozen=True)
class Cell:
    """A cell with its text after a bar of length `share`, or in bold without a share."""

    text: str
    share: str = ""


@dataclass(frozen=True)
class Table:
    """A table that scrolls by itself.

    Args:
        header: titles of the columns; may be empty.
        rows: rows of cells; the first cell is the row's name.
        texts: number of columns with sentences, at the end; the others have numbers.
        is_long: whether it also scrolls down.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str | Cell]]
    texts: int = 0
    is_long: bool = False


def describe_results(report: Report | None) -> Facts | None:
    """Describe the results of every stage, as a table with a figure and notes."""
    if report is None:
        return None
    rows: list[Sequence[str]] = [[label, *cells] for label, cells in list_rows(report)]
    if any(stage.held_out for stage in report.stages):
        values = [stage.held_out for stage in report.stages]
        rows.append(["ppl held-out calibration text", *("–" if value is None else f"{value:.2f}" for value in values)])
    return {
        "table": Table(["", *(stage.name for stage in report.stages)], rows),
        "picture": _picture(partial(draw_perplexities, report), "Perplexity of every stage"),
        "notes": [f"{text.rstrip('.')}." for text in (report.rounding, report.protocol, report.note) if text],
    }


def describe_checkpoint(
    folder: str, format: str, files: Mapping[str, int], loading: str, needs_remote_code: bool
) -> Facts:
    """Describe the written checkpoint, and how it is loaded."""
    rows = [[name, f"{size / 1e6:,.1f} MB"] for name, size in files.items()]
    return {"folder": folder, "format": format, "loading": loading, "table": Table([], rows)}


def describe_guard(guard: Mapping[str, Any] | None, report: Report | None) -> Facts | None:
    """Describe the guard's verdict, and the possible causes of a broken model."""
    if guard is None:
        return None
    if not guard:
        held = [] if report is None else [stage.held_out for stage in report.stages if stage.held_out]
        if len(held) < 2:
            return None
        ratio = f"{held[-1] / held[0]:,.2f} times the dense model's {held[0]:,.2f}"
        sentence = f"✓ perplexity on held-out calibration text is {held[-1]:,.2f}, {ratio}"
        return {"sentence": sentence, "verdict": None, "causes": None}
    found = guard.get("error") or (
        f"perplexity on held-out calibration text was {guard['perplexity']:,.2f}, "
        f"{guard['perplexity'] / guard['dense']:,.1f} times the dense model's {guard['dense']:,.2f}"
    )
    mark, what = ("✗", "The guard stopped the run") if guard["stopped"] else ("!", "The guard warned")
    diagnosis = guard.get("diagnosis")
    return {
        "sentence": f"{mark} {what}: {found}.",
        "verdict": diagnosis["verdict"] if diagnosis else None,
        "causes": _list_causes(diagnosis) if diagnosis else None,
    }


def _list_causes(diagnosis: Mapping[str, Any]) -> Table:
    rows: list[Sequence[str | Cell]] = [
        ["none (dense)", _number(diagnosis["dense"]), "", "", ""],
        ["pruned", _number(diagnosis["pruned"]), "", "as it is", ""],
    ]
    if diagnosis["cut"] is not None:
        rows.append(["cut", _number(diagnosis["cut"]), "", "the plan by gates, without repair or training", ""])
    for one in diagnosis["findings"]:
        share = "" if one["explains"] is None else f"{one['explains']:.0%}"
        name = Cell(one["cause"]) if one == diagnosis["verdict"] else one["cause"]
        rows.append([name, _number(one["perplexity"]), share, one["sentence"], one["setting"]])
    return Table(["cause", "perplexity", "gives back", "what was found", "what to do"], rows, texts=2)


def describe_plan(plan: PruningPlan | None) -> Facts | None:
    """Describe how many units each layer kept."""
    if plan is None:
        return None
    before, after = plan.geometry, plan.pruned_geometry
    rows: list[Sequence[str | Cell]] = []
    for layer in range(before.num_layers):
        counts = [
            (kept[layer], dense[layer])
            for kept, dense in (
                (after.query_heads, before.query_heads),
                (after.kv_heads, before.kv_heads),
                (after.channels, before.channels),
            )
        ]
        rows.append([str(layer), *(_count(*pair) for pair in counts), _bar(*counts[0]), _bar(*counts[2])])
    header = ["layer", "query heads", "KV heads", "MLP channels", "attention", "MLP"]
    return {
        "picture": _picture(partial(draw_plan, plan), "What each layer kept"),
        "ratio": plan.describe_ratio().replace("✅", "✓"),
        "layers": Table(header, rows, is_long=True),
    }


def describe_damages(report: Report | None) -> Facts | None:
    """Describe the predicted and the measured damage of each layer's cut."""
    if report is None or not report.damages:
        return None
    rows = [
        [str(damage.layer), f"{damage.attention:.4f}", f"{damage.mlp:.4f}", _four_digits(damage.measured)]
        for damage in report.damages
    ]
    header = ["layer", "attention, predicted", "MLP, predicted", "measured"]
    return {
        "picture": _picture(partial(draw_damages, report), "Damage of each layer's cut, predicted and measured"),
        "table": Table(header, rows, is_long=True),
    }


def describe_importance(importance: Mapping[BlockKey, float], method: str) -> Facts | None:
    """Describe how much each layer matters."""
    if not importance:
        return None
    return {"picture": _picture(partial(draw_importance, importance, method), "Importance of every layer")}


def describe_outliers(report: Report | None) -> Facts | None:
    """Describe the units that carry massive activations, strongest first."""
    if report is None or not report.outliers:
        return None
    strongest = sorted(report.outliers, key=lambda outlier: -outlier.ratio)
    rows = [[str(outlier.key), f"{outlier.unit:,}", f"{outlier.ratio:,.0f}×"] for outlier in strongest]
    return {"table": Table(["block", "unit", "largest output against the median unit's"], rows, is_long=True)}


def describe_repair(report: Report | None) -> Facts | None:
    """Describe the error of each repaired block, before and after."""
    if report is None or not report.repairs:
        return None
    rows = []
    for repair in report.repairs:
        refinement = repair.refinement
        refined = (
            ["", ""] if refinement is None else [f"{e:.2%}" for e in (refinement.error_before, refinement.error_after)]
        )
        ridge = "as it was cut" if repair.ridge is None else f"{repair.ridge:g}"
        rows.append([str(repair.key), ridge, f"{repair.error_before:.2%}", f"{repair.error_after:.2%}", *refined])
    header = ["block", "ridge", "error as cut", "refitted", "before refinement", "refined"]
    return {"sentence": f"{report.describe_repair()}.", "table": Table(header, rows, is_long=True)}


def describe_samples(samples: Sequence[tuple[str, Mapping[int, str]]]) -> Facts | None:
    """Describe continuations in the course of training: a prompt and its texts each, step -> text, dense below 0."""
    prompts = [
        {
            "title": _on_one_line(prompt),
            "quotes": [_quote("dense" if step < 0 else f"step {step:,}", text) for step, text in texts.items()],
        }
        for prompt, texts in samples
    ]
    return {"prompts": prompts} if prompts else None


def describe_predictions(predictions: Mapping[str, Any] | None) -> Facts | None:
    """Describe the texts of the dense and the pruned model side by side, with their verdicts."""
    if predictions is None:
        return None
    prompts = [
        {
            "title": _on_one_line(one["prompt"]),
            "quotes": [_quote(name, one[name]["text"]) for name in ("dense", "pruned") if one[name] is not None],
            "verdict": _verdict(one["verdict"]),
        }
        for one in predictions["prompts"]
    ]
    return {"verdict": _verdict(predictions["verdict"]), "note": predictions["note"], "prompts": prompts}


def describe_origin(command: Sequence[str], versions: Mapping[str, str], began: datetime, written: datetime) -> Facts:
    """Describe the command, the versions and the time of the run."""
    seconds = round((written - began).total_seconds())
    rows = [[name, version] for name, version in versions.items()]
    rows += [
        ["began", began.isoformat(" ", "seconds")],
        ["this page", written.isoformat(" ", "seconds")],
        ["time", f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"],
    ]
    return {"command": shlex.join(command), "table": Table([], rows)}


def _picture(draw: Callable[..., matplotlib.figure.Figure | None], about: str) -> dict[str, str] | None:
    picture = {"about": about}
    for name, width in _WIDTHS.items():
        figure = draw(width=width)
        if figure is None:
            return None
        picture[name] = f"data:image/svg+xml;base64,{base64.b64encode(encode_figure(figure, 'svg')).decode()}"
    return picture


def _quote(who: str, text: str) -> dict[str, str]:
    return {"who": who, "text": text.strip("\n") or "(nothing)"}


def _on_one_line(prompt: str) -> str:
    return " ".join(prompt.split())


def _bar(kept: int, dense: int) -> str | Cell:
    return Cell(f"{kept / dense:.0%}", share=f"{kept / dense:.4f}") if dense else ""


def _count(kept: int, dense: int) -> str:
    return f"{kept:,} of {dense:,}" if kept < dense else f"{kept:,}"


def _number(perplexity: float | None) -> str:
    return "" if perplexity is None else f"{perplexity:,.2f}"


def _four_digits(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _verdict(verdict: Mapping[str, str]) -> str:
    return f"{_MARKS[verdict['level']]} {verdict['level']}: {verdict['reason']}"
