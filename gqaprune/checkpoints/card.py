"""The model card: `README.md` of a checkpoint's folder, with the front matter that the hub reads."""

import json
import shlex
from collections.abc import Sequence
from pathlib import Path

from gqaprune.checkpoints.formats import FORMATS
from gqaprune.common.atomic_files import write_atomically
from gqaprune.plan import Geometry, PruningPlan
from gqaprune.reporting.report import Report

CARD_FILE = "README.md"

_BASES = {"decoder": "decoder-layer parameters", "all": "parameters"}


def write_card(
    folder: Path,
    plan: PruningPlan,
    format: str,
    written: Geometry,
    report: Report | None = None,
    command: Sequence[str] = (),
    name: str = "",
) -> None:
    """Write the card of a checkpoint.

    Args:
        folder: of the checkpoint.
        plan: what was cut.
        format: of the checkpoint.
        written: shapes in its files.
        report: what was measured.
        command: that made it.
        name: that the folder is going to have, if another.
    """
    dense, entry = Path(plan.model).name or "a model", FORMATS[format]
    front = ["library_name: transformers", "pipeline_tag: text-generation", "tags: [gqaprune, pruned]"]
    if _is_hub_name(plan.model):
        front.insert(0, f"base_model: {json.dumps(plan.model)}")
    file = next((path.name for path in folder.glob(entry.file)), "") if entry.file else ""
    asked = [f"{plan.rate:.1%} of its {_BASES[plan.rate_base]}"] if plan.rate else []
    asked += [f"{plan.kv_rate:.1%} of its KV heads"] if plan.kv_rate else []
    lines = [
        "---",
        *front,
        "---",
        "",
        f"# {dense}, pruned",
        "",
        f"{dense}, asked to lose {' and '.join(asked) or 'nothing'}, by gqaprune: units chosen by `{plan.criterion}`, "
        f"allocation `{plan.allocation}`. {plan.describe_ratio()}.",
        "",
        entry.about,
        "",
        entry.loading.format(folder=name or folder.name, file=file),
        "",
        "## What each layer kept",
        "",
        *_list_layers(plan),
    ]
    if padding := describe_padding(plan.pruned_geometry, written, plan.geometry):
        lines += ["", padding]
    if report is not None and any(stage.perplexity for stage in report.stages):
        lines += ["", "## Perplexity", "", *_list_perplexities(report), "", f"{report.protocol.rstrip('.')}."]
    if command:
        lines += [
            "",
            "## How it was made",
            "",
            "```bash",
            shlex.join(command),
            "```",
            "",
            "`plan.json` says which units stayed.",
        ]
    write_atomically(folder / CARD_FILE, ("\n".join(lines) + "\n").encode())


def _is_hub_name(model: str) -> bool:
    """Whether a model is not a folder here but `owner/name` on the hub."""
    return model.count("/") == 1 and not model.startswith((".", "~", "/")) and not Path(model).exists()


def _list_layers(plan: PruningPlan) -> list[str]:
    """A table, equal neighbours in one row."""
    before, after = plan.geometry, plan.pruned_geometry
    rows: list[tuple[int, int, tuple[str, ...]]] = []
    for layer in range(before.num_layers):
        cells = tuple(
            f"{kept:,} of {dense:,}" if kept < dense else f"{kept:,}"
            for kept, dense in (
                (after.query_heads[layer], before.query_heads[layer]),
                (after.kv_heads[layer], before.kv_heads[layer]),
                (after.channels[layer], before.channels[layer]),
            )
        )
        if rows and rows[-1][2] == cells:
            rows[-1] = (rows[-1][0], layer, cells)
        else:
            rows.append((layer, layer, cells))
    lines = ["| layers | query heads | KV heads | MLP channels |", "| --- | ---: | ---: | ---: |"]
    for first, last, cells in rows:
        lines.append(f"| {first if first == last else f'{first}-{last}'} | {' | '.join(cells)} |")
    return lines


def describe_padding(pruned: Geometry, written: Geometry, dense: Geometry | None = None) -> str:
    """What padding put into the files, in a sentence; empty where there is none.

    Args:
        pruned: shapes of the model.
        written: shapes in its files.
        dense: shapes before pruning, if they are known.
    """
    zeros = written.projection_weights - pruned.projection_weights
    if not zeros:
        return ""
    heads = f"{written.query_heads[0]} query heads on {written.kv_heads[0]} KV heads"
    removed = 0 if dense is None else dense.projection_weights - pruned.projection_weights
    share = f", {zeros / removed:.0%} of what pruning removed" if removed else ""
    return (
        f"In the files every layer has {heads} and {written.channels[0]:,} channels, those it lacks as zeros: "
        f"{zeros / 1e6:,.2f} M parameters{share}."
    )


def _list_perplexities(report: Report) -> list[str]:
    names = [stage.name for stage in report.stages]
    lines = [f"| | {' | '.join(names)} |", f"| --- |{' ---: |' * len(names)}"]
    for corpus in report.stages[0].perplexity:
        values = [stage.perplexity.get(corpus) for stage in report.stages]
        lines.append(f"| {corpus} | {' | '.join('–' if value is None else f'{value:.2f}' for value in values)} |")
    return lines
