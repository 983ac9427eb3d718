"""Build `report.html`: one page about a run, without network or scripts, for screens, phones, paper and dark mode.

`sections.py` prepares plain data and `templates/` turns it into HTML. Jinja escapes every string, because texts of
models and names of users may contain anything.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from gqaprune.plan import BlockKey, PruningPlan
from gqaprune.reporting import sections
from gqaprune.reporting.charts import make_readable
from gqaprune.reporting.report import Report, describe_request, describe_verdict

PAGE_FILE = "report.html"


@dataclass(frozen=True)
class Sample:
    """A model's continuations of a prompt at several steps.

    Args:
        prompt: the prompt.
        texts: step -> text; steps below 0 mean the dense model.
    """

    prompt: str
    texts: Mapping[int, str]


@dataclass(frozen=True)
class Checkpoint:
    """A written checkpoint, and how it is loaded.

    Args:
        folder: folder of the checkpoint.
        format: name of its format.
        files: name -> bytes.
        loading: code that loads it.
        needs_remote_code: whether loading runs code of the checkpoint.
    """

    folder: str
    format: str
    files: Mapping[str, int]
    loading: str
    needs_remote_code: bool = False


@dataclass(frozen=True)
class Page:
    """The content of a page; sections without content are left out.

    Args:
        title: name of the model.
        state: progress of the run, in words.
        began: time at which the run began.
        written: time at which the page is written.
        command: command of the run.
        versions: name -> version of its dependencies.
        report: measured stages.
        plan: plan of the cut.
        importance: importance of every block, if the allocation used it.
        importance_method: method that measured it.
        guard: content of `guard.json`; empty if the guard did not fire, None if there is no guard.
        samples: continuations of prompts during training.
        predictions: content of `predictions.json`.
        checkpoint: the checkpoint, once it is written.
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
        verdict += "; loads with remote code" if page.checkpoint.needs_remote_code else "; loads without remote code"
    return _TEMPLATES.get_template("page.html").render(
        title=page.title, verdict=verdict, request=request, state=page.state, sections=shown
    )


def _clean(value: object) -> object:
    """Replace characters that browsers cannot read; HTML that a macro made from clean strings stays as it is."""
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
