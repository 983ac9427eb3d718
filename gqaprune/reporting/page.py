"""`report.html`: a run on one page that needs neither network nor scripts, on a phone, on paper, in the dark.

`sections.py` prepares plain data and `templates/` makes HTML of it. Jinja escapes every text, since what models write
and users name may hold anything.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from gqaprune.plan import BlockKey, PruningPlan
from gqaprune.reporting import sections
from gqaprune.reporting.figures import make_readable
from gqaprune.reporting.report import Report, describe_request, describe_verdict

PAGE_FILE = "report.html"


@dataclass(frozen=True)
class Sample:
    """What a model made of a prompt, as it went on.

    Args:
        prompt: as it was given.
        texts: step -> text; below 0 the dense model's.
    """

    prompt: str
    texts: Mapping[int, str]


@dataclass(frozen=True)
class Checkpoint:
    """What was written, and how it is loaded.

    Args:
        folder: where it is.
        format: its name.
        files: name -> bytes.
        loading: code that loads it.
        needs_remote_code: whether that runs code of the checkpoint's.
    """

    folder: str
    format: str
    files: Mapping[str, int]
    loading: str
    needs_remote_code: bool = False


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
        checkpoint: once it is written.
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
    checkpoint: Checkpoint | None = None


def build_page(page: Page) -> str:
    """Build the page as HTML."""
    facts = {
        "checkpoint": (
            "Checkpoint",
            page.checkpoint and sections.describe_checkpoint(**vars(page.checkpoint)),
        ),
        "results": ("Results", sections.describe_results(page.report)),
        "guard": ("Guard", sections.describe_guard(page.guard, page.report)),
        "plan": ("What each layer kept", sections.describe_plan(page.plan)),
        "damages": ("Damage", sections.describe_damages(page.report)),
        "importance": ("Importance of layers", sections.describe_importance(page.importance, page.importance_method)),
        "outliers": ("Outliers", sections.describe_outliers(page.report)),
        "repair": ("Repair", sections.describe_repair(page.report)),
        "samples": ("Samples", sections.describe_samples([(sample.prompt, sample.texts) for sample in page.samples])),
        "predictions": ("Predictions", sections.describe_predictions(page.predictions)),
        "origin": ("How it was made", sections.describe_origin(page.command, page.versions, page.began, page.written)),
    }
    shown = [
        {"macro": macro, "title": title, "anchor": title.lower().replace(" ", "-"), "facts": known}
        for macro, (title, known) in facts.items()
        if known is not None
    ]
    request = None if page.report is None else describe_request(page.report)
    verdict = None if page.report is None else describe_verdict(page.report)
    if verdict and page.checkpoint is not None:
        verdict += "; it loads with code of its own" if page.checkpoint.needs_remote_code else "; it loads as it is"
    return _TEMPLATES.get_template("page.html").render(
        title=page.title, verdict=verdict, request=request, state=page.state, sections=shown
    )


def _clean(value: object) -> object:
    """Replace what no browser reads in a text; HTML that a macro made of clean texts stays as it is."""
    if not isinstance(value, str) or hasattr(value, "__html__"):
        return value
    return make_readable(value.replace("\r\n", "\n"))


_TEMPLATES = Environment(
    loader=PackageLoader("gqaprune.reporting"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
    finalize=_clean,
)
