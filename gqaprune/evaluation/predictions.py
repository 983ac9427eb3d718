"""Show texts of the dense and the pruned model side by side: as data, as JSON and on the console."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from gqaprune.common.atomic_files import write_atomically
from gqaprune.evaluation.judgement import Level, MeasuredText, Verdict, judge, judge_all

FORMAT = "gqaprune-predictions/1"
MARKS: dict[Level, tuple[str, str]] = {"fine": ("✅", "green"), "degraded": ("🔶", "yellow"), "broken": ("❌", "red")}
"""Mark and color of each verdict."""


@dataclass(frozen=True)
class TextPair:
    """Texts of both models for one prompt.

    Args:
        prompt: the prompt.
        pruned: text of the judged model.
        dense: text of the dense model, if there is one.
    """

    prompt: str
    pruned: MeasuredText
    dense: MeasuredText | None = None

    @property
    def verdict(self) -> Verdict:
        """Verdict on the pruned model's text."""
        return judge(self.pruned, self.dense)


@dataclass(frozen=True)
class Predictions:
    """Results of `predict`.

    Args:
        model: name or folder of the judged model.
        dense: name or folder of the dense model; empty if there is none.
        note: why there is no dense model, in a sentence.
        comparisons: a pair of texts for each prompt.
    """

    model: str
    dense: str
    note: str
    comparisons: Sequence[TextPair]

    @property
    def verdict(self) -> Verdict:
        """Verdict over all prompts."""
        return judge_all([comparison.verdict for comparison in self.comparisons])

    def to_dict(self) -> dict[str, Any]:
        """Convert it to plain types, for the file."""
        return {
            "format": FORMAT,
            "model": self.model,
            "dense": self.dense or None,
            "note": self.note,
            "verdict": self.verdict._asdict(),
            "prompts": [
                {
                    "prompt": comparison.prompt,
                    "verdict": comparison.verdict._asdict(),
                    "pruned": comparison.pruned.to_dict(),
                    "dense": None if comparison.dense is None else comparison.dense.to_dict(),
                }
                for comparison in self.comparisons
            ],
        }

    def save(self, path: Path) -> None:
        """Write the file, atomically."""
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, (json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n").encode())


def render_predictions(predictions: Predictions) -> RenderableType:
    """Render every prompt with its texts side by side and the verdict below, then the verdict over all prompts."""
    parts: list[RenderableType] = []
    for comparison in predictions.comparisons:
        parts += [Rule(Text(" ".join(comparison.prompt.split()), "bold")), _build_table(comparison)]
        parts += [_show_verdict(comparison.verdict), Text()]
    parts += [Rule(), _show_verdict(predictions.verdict, "all prompts: ")]
    if predictions.note:
        parts.append(Text(predictions.note, "dim"))
    return Group(*parts)


def _build_table(comparison: TextPair) -> Table:
    texts = {"dense": comparison.dense, "pruned": comparison.pruned}
    shown = {name: text for name, text in texts.items() if text is not None}
    table = Table(box=None, expand=True, padding=(0, 2, 0, 0))
    for name in shown if len(shown) > 1 else [""]:
        table.add_column(name, ratio=1, header_style="dim")
    table.add_row(*(Text(text.text.strip() or "(nothing)") for text in shown.values()))
    table.add_row(*(Text(_describe_measures(text), "dim") for text in shown.values()))
    return table


def _describe_measures(text: MeasuredText) -> str:
    distinct = "/".join("–" if share is None else f"{share:.2f}" for share in text.distinct)
    parts = [f"{text.tokens} tokens", f"{text.repetition:.0%} repeated", f"distinct-1/2/3 {distinct}"]
    if text.perplexity is not None:
        parts.append(f"the dense model's perplexity {text.perplexity:.2f}")
    return ", ".join(parts)


def _show_verdict(verdict: Verdict, before: str = "") -> Text:
    mark, color = MARKS[verdict.level]
    return Text.assemble(before, (f"{mark} {verdict.level}", color), f": {verdict.reason}")
