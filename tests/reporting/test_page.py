"""The page of a run: whole HTML with the report's numbers, nothing from outside, and no text that acts."""

import base64
import re
from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from jinja2 import UndefinedError
from test_figures import make_plan
from test_report import make_report

from gqaprune.plan import BlockKey
from gqaprune.reporting import page as page_module
from gqaprune.reporting import sections
from gqaprune.reporting.page import Checkpoint, Page, Sample, build_page
from gqaprune.reporting.report import Outlier, Report, describe_request, list_rows
from gqaprune.surgery.refinement import Refinement
from gqaprune.surgery.repair import BlockRepair

HOSTILE = (
    '</pre><script>alert(1)</script><img src="https://evil.example/x.png" onerror=alert(1)>&amp;\x00\x1b[31m\ud800'
)
BEGAN = datetime(2026, 11, 23, 4, 0, tzinfo=timezone(timedelta(hours=1)))
VOID = {"meta", "img", "source"}
TEMPLATES = Path(page_module.__file__).parent / "templates"


def make_diagnosis(cause: str = "rate") -> dict[str, Any]:
    findings = [
        {"cause": "repair", "sentence": "repair made it worse", "setting": "set repair to none", "perplexity": 150.5,
         "explains": 0.07},
        {"cause": cause, "sentence": "too much is removed", "setting": "lower pruning.rate", "perplexity": 12.5,
         "explains": 0.93},
    ]  # fmt: skip
    return {
        "dense": 11.0,
        "pruned": 180.0,
        "cut": 175.25,
        "findings": findings,
        "layers": {},
        "verdict": findings[1],
    }


def make_guard(**facts: Any) -> dict[str, Any]:
    return {"perplexity": 180.0, "dense": 11.0, "stopped": True, "diagnosis": make_diagnosis()} | facts


def make_predictions(text: str = "the the the") -> dict[str, Any]:
    verdict = {"level": "broken", "reason": "repeats “the” to the end"}
    row = {"prompt": "Once upon", "verdict": verdict, "pruned": {"text": text}, "dense": {"text": "a time"}}
    return {"verdict": verdict, "note": "", "prompts": [row]}


def make_full_report() -> Report:
    report = make_report()
    report.stages = [
        replace(stage, held_out=value) for stage, value in zip(report.stages, (10.5, 12.25, None), strict=True)
    ]
    report.repairs = [
        BlockRepair(BlockKey(0, "mlp"), 0.3, 0.1234, 0.0567, Refinement(0.05, 0.0432)),
        BlockRepair(BlockKey(1, "attention"), None, 0.02, 0.02),
    ]
    report.outliers = [Outlier(BlockKey(1, "mlp"), 7, 21.5), Outlier(BlockKey(2, "mlp"), 1234, 2700.4)]
    return report


def make_page(**parts: Any) -> Page:
    whole: dict[str, Any] = {
        "command": ["gqaprune", "fit", "--model.pretrained", "my model"],
        "versions": {"torch": "2.13.0", "gqaprune": "0.1.0"},
        "report": make_full_report(),
        "plan": make_plan(),
        "importance": {BlockKey(layer, kind): 0.1 * layer for layer in range(6) for kind in ("attention", "mlp")},
        "importance_method": "removal",
        "guard": {},
        "samples": [Sample("Once upon", {0: "a tme", 8: "a time"})],
        "predictions": make_predictions(),
    }
    return Page("tiny", "finished", BEGAN, BEGAN + timedelta(hours=1, seconds=62), **whole | parts)


def test_the_page_begins_with_a_verdict_and_says_how_the_checkpoint_loads() -> None:
    files = {"model.safetensors": 431_900_000, "config.json": 2_000}
    checkpoint = Checkpoint("logs/checkpoint", "per-layer", files, "load('logs/checkpoint')", True)
    page = build_page(make_page(checkpoint=checkpoint))
    stages = make_full_report().stages
    ratio = stages[-1].perplexity["val/embedded"] / stages[0].perplexity["val/embedded"]
    smaller = f"{1 - stages[-1].parameters / stages[0].parameters:.1%} fewer parameters"
    lead = f'<p class="lead">{smaller}, {ratio:.2f} times the perplexity on embedded'
    assert lead in page and "a KV cache 33.3% smaller; loads with remote code.</p>" in page
    assert "431.9 MB" in page and "load(&#39;logs/checkpoint&#39;)" in page
    assert not set("✅❌🔶") & set(build_page(make_page(guard={})))


class Reader(HTMLParser):
    """Checks that elements close in order; keeps attributes, texts, tables and headings."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, Mapping[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.rows: list[list[str]] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open:
            self.texts.append((self.open[-1], data))
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data

    def find(self, tag: str) -> list[str]:
        return [text for own, text in self.texts if own == tag]


def test_page_holds_the_results_of_every_stage() -> None:
    reader = Reader(build_page(make_page()))
    assert ["", "dense", "pruned", "recovered"] in reader.rows
    for label, cells in list_rows(make_report()):
        assert [label, *cells] in reader.rows
    assert ["ppl held-out calibration text", "10.50", "12.25", "–"] in reader.rows
    assert {describe_request(make_report()), "perplexity: token-weighted, whole split."} <= set(reader.find("p"))
    assert any("1.17 times the dense model's 10.50" in text for text in reader.find("p"))


def test_page_holds_plan_outliers_and_repair_by_layer_and_block() -> None:
    reader, report = Reader(build_page(make_page())), make_full_report()
    rows, texts = reader.rows, reader.find("p")
    assert make_plan().describe_ratio().replace("✅", "✓") in texts and f"{report.describe_repair()}." in texts
    assert any("massive activations; they are removed last" in text for text in texts)
    assert ["4", "6 of 9", "2 of 3", "8 of 20", "67%", "40%"] in rows
    assert rows.index(["layer 2 mlp", "1,234", "2,700×"]) < rows.index(["layer 1 mlp", "7", "22×"])
    assert ["layer 0 mlp", "0.3", "12.34%", "5.67%", "5.00%", "4.32%"] in rows
    assert ["layer 1 attention", "as it was cut", "2.00%", "2.00%", "", ""] in rows


def test_page_says_how_it_was_made() -> None:
    reader = Reader(build_page(make_page()))
    assert "gqaprune fit --model.pretrained 'my model'" in reader.find("pre")
    for row in (["torch", "2.13.0"], ["began", "2026-11-23 04:00:00+01:00"], ["time", "1:01:02"]):
        assert row in reader.rows
    assert "finished" in reader.find("p")


def test_page_shows_samples_by_step_and_predictions_side_by_side() -> None:
    reader = Reader(build_page(make_page()))
    assert reader.find("figcaption") == ["step 0", "step 8", "dense", "pruned"]
    assert reader.find("pre")[:4] == ["a tme", "a time", "a time", "the the the"]
    assert reader.find("h3").count("Once upon") == 2
    assert reader.find("p").count("✗ broken: repeats “the” to the end") == 2
    noted = make_predictions() | {"note": "without the dense model"}
    assert "without the dense model" in Reader(build_page(make_page(predictions=noted))).find("p")


def test_page_of_a_stopped_run_has_the_verdict_and_every_cause() -> None:
    reader = Reader(build_page(make_page(guard=make_guard())))
    assert any("stopped the run" in text and "180.00, 16.4 times" in text for text in reader.find("p"))
    assert reader.find("strong") == ["too much is removed", "rate"]
    assert any("cause undone by itself" in text for text in reader.find("h3"))
    for row in (
        ["none (dense)", "11.00", "", "", ""],
        ["pruned", "180.00", "", "as it is", ""],
        ["cut", "175.25", "", "the plan by gates, without repair or training", ""],
        ["repair", "150.50", "7%", "repair made it worse", "set repair to none"],
        ["rate", "12.50", "93%", "too much is removed", "lower pruning.rate"],
    ):
        assert row in reader.rows
    without = Reader(build_page(make_page(guard={"error": "layer 1 is not finite", "stopped": True})))
    assert any("layer 1 is not finite" in text for text in without.find("p"))


def test_sections_without_anything_to_tell_are_left_out() -> None:
    page = Page("tiny", "finished", BEGAN, BEGAN, predictions=make_predictions())
    assert Reader(build_page(page)).find("h2") == ["Predictions", "How it was made"]
    assert Reader(build_page(make_page(guard=None))).find("h2")[:2] == ["Results", "What each layer kept"]


def test_page_needs_nothing_from_outside() -> None:
    page = build_page(make_page(guard=make_guard()))
    assert not re.search(r"https?:|//[a-z]|@import|url\(|<script|<link", page)
    assert len(read_pictures(page, "img", "src")) == 3 == len(read_pictures(page, "source", "srcset"))


def read_pictures(page: str, tag: str, attribute: str) -> list[str]:
    pictures = [(own[attribute] or "").split(",") for found, own in Reader(page).tags if found == tag]
    assert {head for head, _ in pictures} == {"data:image/svg+xml;base64"}
    return [base64.b64decode(data).decode() for _, data in pictures]


def test_every_picture_has_its_words_as_text_and_a_narrow_one_for_phones() -> None:
    page = build_page(make_page())
    for wide, narrow in zip(read_pictures(page, "img", "src"), read_pictures(page, "source", "srcset"), strict=True):
        widths = [float(svg.partition('width="')[2].partition("pt")[0]) for svg in (wide, narrow)]
        assert widths == pytest.approx([72 * 10.5, 72 * 4.2]) and wide.count("<text") > 5 < narrow.count("<text")
    assert any("KV heads: 12 of 18 kept" in svg for svg in read_pictures(page, "source", "srcset"))


@pytest.mark.parametrize(
    "place",
    ["title", "state", "sample", "prompt", "prediction", "guard", "cause", "command", "version", "corpus", "note"],
)
def test_texts_of_models_and_users_are_shown_and_do_nothing(place: str) -> None:
    page = make_page(guard=make_guard())
    report = make_full_report()
    report.stages = [replace(stage, perplexity={HOSTILE: 5.0}) for stage in report.stages]
    hostile: dict[str, Any] = {
        "title": {"title": HOSTILE},
        "state": {"state": HOSTILE},
        "sample": {"samples": [Sample("a", {0: HOSTILE})]},
        "prompt": {"samples": [Sample(HOSTILE, {0: "a"})]},
        "prediction": {"predictions": make_predictions(HOSTILE)},
        "guard": {"guard": {"error": HOSTILE, "stopped": True}},
        "cause": {"guard": make_guard(diagnosis=make_diagnosis(HOSTILE))},
        "command": {"command": ["gqaprune", HOSTILE]},
        "version": {"versions": {HOSTILE: "1"}},
        "corpus": {"report": report},
        "note": {"report": replace(report, note=HOSTILE, stages=make_report().stages)},
    }
    reader, clean = Reader(build_page(replace(page, **hostile[place]))), Reader(build_page(page))
    assert {tag for tag, _ in reader.tags} <= {tag for tag, _ in clean.tags}
    assert not any(name.startswith("on") for _, own in reader.tags for name in own)
    assert all((own.get("src") or "data:").startswith("data:") for _, own in reader.tags)
    shown = "".join(text for _, text in reader.texts)
    assert "<script>alert(1)</script>" in shown and "&amp;" in shown
    assert not re.search(r"[\x00\x1b\ud800]", shown)


def test_no_template_marks_a_text_as_safe() -> None:
    sources = [path.read_text() for path in TEMPLATES.glob("*.html")]
    assert len(sources) == 3 and not re.search(r"\bsafe\b|autoescape", "".join(sources))


def test_text_that_looks_like_a_template_stays_text() -> None:
    text = "{{ 7 * 7 }} {% raw %} {# note #}"
    page = make_page(samples=[Sample(text, {0: text})])
    reader = Reader(build_page(replace(page, title=text, state=text)))
    assert [text in reader.find(tag) for tag in ("h1", "p", "h3", "pre")] == [True] * 4


def test_template_that_misses_a_fact_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    known = sections.describe_plan(make_plan())
    monkeypatch.setattr(sections, "describe_plan", lambda _: {name: known[name] for name in ("picture", "layers")})
    with pytest.raises(UndefinedError, match="ratio"):
        build_page(make_page())


def test_page_holds_its_whole_style_sheet() -> None:
    page, style = build_page(make_page()), (TEMPLATES / "page.css").read_text()
    assert f"<style>\n{style}</style>" in page


def test_page_is_bytes_that_every_browser_reads() -> None:
    page = build_page(make_page(samples=[Sample(HOSTILE, {0: "é\r\n  two"})]))
    assert page.encode().decode() == page and "é\n  two" in page
    assert page.startswith("<!doctype html>") and '<meta charset="utf-8">' in page
