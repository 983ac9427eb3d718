"""`report.html`: a run on one page that needs neither network nor scripts, on a phone, on paper, in the dark.

Every text is escaped: what models write and users name may hold anything. Figures are pictures inside of the page.
"""

import base64
import html
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import matplotlib.figure

from gqaprune.plan import BlockKey, PruningPlan
from gqaprune.reporting.figures import draw_importance, draw_perplexities, draw_plan, encode_figure, make_readable
from gqaprune.reporting.page_style import STYLE
from gqaprune.reporting.report import Report, describe_request, list_rows

PAGE_FILE = "report.html"

_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
"""Says to browsers what the page holds to by itself: nothing is loaded and nothing runs."""
_NARROW = 7.0
"""Inches of a figure that can be read on a phone."""
_MARKS = {"fine": "✅", "degraded": "🔶", "broken": "❌"}


@dataclass(frozen=True)
class Sample:
    """What a model made of a prompt, as it went on.

    Args:
        prompt: as it was given.
        texts: step -> text.
    """

    prompt: str
    texts: Mapping[int, str]


@dataclass(frozen=True)
class Page:
    """What a page tells; what there is none of is left out.

    Args:
        title: name of the model.
        state: how far the run is, in words.
        began: when it began.
        written: when this was written.
        command: that runs it.
        versions: name -> version of what it depends on.
        report: what was measured.
        plan: what was cut.
        importance: of every block, where the allocation looked at it.
        importance_method: how that was measured.
        guard: as `guard.json` holds it; empty where the guard found nothing, None where there is no guard.
        samples: continuations in the course of training.
        predictions: as `predictions.json` holds them.
    """

    title: str
    state: str
    began: datetime
    written: datetime
    command: Sequence[str] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    report: Report | None = None
    plan: PruningPlan | None = None
    importance: Mapping[BlockKey, float] = field(default_factory=dict)
    importance_method: str = ""
    guard: Mapping[str, Any] | None = None
    samples: Sequence[Sample] = ()
    predictions: Mapping[str, Any] | None = None


class _Html(str):
    """Text that is HTML already; all other text is escaped."""


def build_page(page: Page) -> str:
    """The page as HTML."""
    sections = {
        "Results": _show_results(page.report),
        "Guard": _show_guard(page.guard, page.report),
        "What each layer kept": _show_plan(page.plan),
        "Importance of layers": _show_importance(page),
        "Outliers": _show_outliers(page.report),
        "Repair": _show_repairs(page.report),
        "Samples": _show_samples(page.samples),
        "Predictions": _show_predictions(page.predictions),
        "How it was made": _show_origin(page),
    }
    shown = {title: body for title, body in sections.items() if body}
    links = [_tag("a", title, href=f"#{_make_id(title)}") for title in shown]
    bodies = [_tag("section", _tag("h2", title), body, id=_make_id(title)) for title, body in shown.items()]
    head = _join(
        [
            _Html('<meta charset="utf-8">'),
            _Html('<meta name="viewport" content="width=device-width, initial-scale=1">'),
            _Html('<meta name="color-scheme" content="light dark">'),
            _Html(f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'),
            _tag("title", f"{page.title}: gqaprune report"),
            _Html(f"<style>{STYLE}</style>"),
        ]
    )
    top = [_tag("h1", page.title)]
    if page.report is not None:
        top.append(_tag("p", describe_request(page.report), class_="lead"))
    top.append(_tag("p", page.state, class_="state"))
    body = _tag("body", _tag("header", *top, _tag("nav", *links)), _tag("main", *bodies))
    return f'<!doctype html>\n<html lang="en">\n<head>\n{head}\n</head>\n{body}\n</html>\n'


def _show_results(report: Report | None) -> _Html:
    if report is None:
        return _Html()
    rows: list[Sequence[str]] = [[label, *cells] for label, cells in list_rows(report)]
    if any(stage.held_out for stage in report.stages):
        values = [stage.held_out for stage in report.stages]
        rows.append(["ppl held-out calibration text", *("–" if value is None else f"{value:.2f}" for value in values)])
    parts = [_table(["", *(stage.name for stage in report.stages)], rows)]
    if (figure := draw_perplexities(report)) is not None:
        parts.append(_picture(figure, "Perplexity of every stage"))
    parts += [_tag("p", f"{text.rstrip('.')}.", class_="note") for text in (report.protocol, report.note) if text]
    return _join(parts)


def _show_guard(guard: Mapping[str, Any] | None, report: Report | None) -> _Html:
    if guard is None:
        return _Html()
    held = [] if report is None else [stage.held_out for stage in report.stages if stage.held_out]
    if not guard:
        if len(held) < 2:
            return _Html()
        ratio = f"{held[-1] / held[0]:,.2f} times the dense model's {held[0]:,.2f}"
        return _tag("p", f"✅ perplexity on held-out calibration text is {held[-1]:,.2f}, {ratio}")
    found = guard.get("error") or (
        f"perplexity on held-out calibration text was {guard['perplexity']:,.2f}, "
        f"{guard['perplexity'] / guard['dense']:,.1f} times the dense model's {guard['dense']:,.2f}"
    )
    mark, what = ("❌", "The guard stopped the run") if guard["stopped"] else ("🔶", "The guard warned")
    parts = [_tag("p", f"{mark} {what}: {found}.")]
    if diagnosis := guard.get("diagnosis"):
        verdict = diagnosis["verdict"]
        parts.append(_tag("p", _tag("strong", verdict["sentence"]), f". What to do: {verdict['setting']}."))
        rows: list[Sequence[str]] = [["none (dense)", _number(diagnosis["dense"]), "", "", ""]]
        rows.append(["pruned", _number(diagnosis["pruned"]), "", "as it is", ""])
        if diagnosis["cut"] is not None:
            what = "the plan by gates, without repair or training"
            rows.append(["cut", _number(diagnosis["cut"]), "", what, ""])
        for one in diagnosis["findings"]:
            share = "" if one["explains"] is None else f"{one['explains']:.0%}"
            name = _tag("strong", one["cause"]) if one == verdict else one["cause"]
            rows.append([name, _number(one["perplexity"]), share, one["sentence"], one["setting"]])
        parts.append(_tag("h3", "Why: each cause undone by itself, on held-out windows"))
        parts.append(_table(["cause", "perplexity", "gives back", "what was found", "what to do"], rows, texts=2))
    return _join(parts)


def _show_plan(plan: PruningPlan | None) -> _Html:
    if plan is None:
        return _Html()
    before, after = plan.geometry, plan.pruned_geometry
    rows = []
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
    return _join(
        [
            _picture(draw_plan(plan), "What each layer kept"),
            _tag("p", plan.describe_ratio()),
            _table(header, rows, is_long=True),
        ]
    )


def _show_importance(page: Page) -> _Html:
    if not page.importance:
        return _Html()
    return _picture(draw_importance(page.importance, page.importance_method), "Importance of every layer")


def _show_outliers(report: Report | None) -> _Html:
    if report is None or not report.outliers:
        return _Html()
    strongest = sorted(report.outliers, key=lambda outlier: -outlier.ratio)
    rows = [[str(outlier.key), f"{outlier.unit:,}", f"{outlier.ratio:,.0f}×"] for outlier in strongest]
    about = "Units that carry massive activations; they are removed last."
    header = ["block", "unit", "largest output against the median unit's"]
    return _join([_tag("p", about), _table(header, rows, is_long=True)])


def _show_repairs(report: Report | None) -> _Html:
    if report is None or not report.repairs:
        return _Html()
    rows = []
    for repair in report.repairs:
        refinement = repair.refinement
        refined = (
            ["", ""] if refinement is None else [f"{e:.2%}" for e in (refinement.error_before, refinement.error_after)]
        )
        ridge = "as it was cut" if repair.ridge is None else f"{repair.ridge:g}"
        rows.append([str(repair.key), ridge, f"{repair.error_before:.2%}", f"{repair.error_after:.2%}", *refined])
    header = ["block", "ridge", "error as cut", "refitted", "before refinement", "refined"]
    return _join([_tag("p", f"{report.describe_repair()}."), _table(header, rows, is_long=True)])


def _show_samples(samples: Sequence[Sample]) -> _Html:
    parts = []
    for sample in samples:
        parts.append(_tag("h3", " ".join(sample.prompt.split())))
        parts += [_said(f"step {step:,}", text) for step, text in sample.texts.items()]
    return _join(parts)


def _show_predictions(predictions: Mapping[str, Any] | None) -> _Html:
    if predictions is None:
        return _Html()
    parts = [_tag("p", _verdict(predictions["verdict"]))]
    if predictions["note"]:
        parts.append(_tag("p", predictions["note"], class_="note"))
    for one in predictions["prompts"]:
        texts = [_said(name, one[name]["text"]) for name in ("dense", "pruned") if one[name] is not None]
        parts += [_tag("h3", " ".join(one["prompt"].split())), _tag("div", *texts, class_="pair")]
        parts.append(_tag("p", _verdict(one["verdict"])))
    return _join(parts)


def _show_origin(page: Page) -> _Html:
    seconds = round((page.written - page.began).total_seconds())
    parts = [] if not page.command else [_tag("pre", shlex.join(page.command))]
    rows = [[name, version] for name, version in page.versions.items()]
    rows += [
        ["began", page.began.isoformat(" ", "seconds")],
        ["this page", page.written.isoformat(" ", "seconds")],
        ["time", f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"],
    ]
    return _join([*parts, _table([], rows)])


def _table(header: Sequence[str], rows: Iterable[Sequence[str]], texts: int = 0, is_long: bool = False) -> _Html:
    """A table that scrolls by itself.

    Args:
        header: may be empty.
        rows: of cells; the first is the row's name.
        texts: so many columns at the end hold sentences, the others numbers.
        is_long: whether it also scrolls down.
    """
    kinds: list[dict[str, str]] = [{}] * (len(header) - texts) + [{"class_": "text"}] * texts
    titles = [_tag("th", cell, scope="col", **kind) for cell, kind in zip(header, kinds, strict=True)]
    head = [_tag("thead", _tag("tr", *titles))] if header else []
    lines = []
    for name, *cells in rows:
        own = [_tag("td", cell, **kind) for cell, kind in zip(cells, kinds[1:] or [{}] * len(cells), strict=True)]
        lines.append(_tag("tr", _tag("th", name, scope="row"), *own))
    class_ = "scroll long" if is_long else "scroll"
    return _tag("div", _tag("table", *head, _tag("tbody", *lines)), class_=class_, tabindex="0")


def _said(who: str, text: str) -> _Html:
    return _tag("figure", _tag("figcaption", who), _tag("pre", text.strip("\n") or "(nothing)", dir="auto"))


def _picture(figure: matplotlib.figure.Figure, about: str) -> _Html:
    data = base64.b64encode(encode_figure(figure, "svg")).decode()
    class_ = "wide" if figure.get_figwidth() > _NARROW else "narrow"
    picture = _Html(f'<img class="{class_}" src="data:image/svg+xml;base64,{data}" alt="{html.escape(about)}">')
    return _tag("div", picture, class_="scroll", tabindex="0")


def _bar(kept: int, dense: int) -> _Html:
    share = kept / dense if dense else 0.0
    bar = _tag("span", class_="bar", style=f"--share:{share:.4f}")
    return _Html(f'{bar}<span class="share">{share:.0%}</span>') if dense else _Html()


def _count(kept: int, dense: int) -> str:
    return f"{kept:,} of {dense:,}" if kept < dense else f"{kept:,}"


def _number(perplexity: float | None) -> str:
    return "" if perplexity is None else f"{perplexity:,.2f}"


def _verdict(verdict: Mapping[str, str]) -> str:
    return f"{_MARKS[verdict['level']]} {verdict['level']}: {verdict['reason']}"


def _make_id(title: str) -> str:
    return title.lower().replace(" ", "-")


def _tag(name: str, *content: str, **attributes: str) -> _Html:
    """An element; a trailing underscore of an attribute's name is left out."""
    own = "".join(f' {key.rstrip("_")}="{html.escape(value)}"' for key, value in attributes.items())
    return _Html(f"<{name}{own}>{_join(content, '')}</{name}>")


def _join(parts: Iterable[str], between: str = "\n") -> _Html:
    return _Html(between.join(part if isinstance(part, _Html) else _escape(part) for part in parts))


def _escape(text: str) -> str:
    return html.escape(make_readable(text.replace("\r\n", "\n")))
