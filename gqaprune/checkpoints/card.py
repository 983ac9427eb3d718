"""The model card: `README.md` of a checkpoint's folder, with the front matter that the hub reads.

The text is `templates/card.md`; it is Markdown, so nothing in it is escaped as HTML.
"""

import json
import shlex
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from gqaprune.checkpoints.formats import FORMATS
from gqaprune.common.atomic_files import write_atomically
from gqaprune.plan import Geometry, PruningPlan
from gqaprune.reporting.report import Report, Stage

CARD_FILE = "README.md"

_VLLM_IGNORES_HEAD_DIM = ("qwen2", "qwen2_moe")
"""Families whose class in vLLM divides the width by the query heads for a head_dim, whatever the config says."""
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
    file = next((path.name for path in folder.glob(entry.file)), "") if entry.file else ""
    asked = [f"{plan.rate:.1%} of its {_BASES[plan.rate_base]}"] if plan.rate else []
    asked += [f"{plan.kv_rate:.1%} of its KV heads"] if plan.kv_rate else []
    data = ModelCardData(
        base_model=plan.model.partition("@")[0] if _is_hub_name(plan.model) else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["gqaprune", "pruned"],
    )
    stages = report.stages if report is not None and any(stage.perplexity for stage in report.stages) else []
    card = ModelCard.from_template(
        data,
        template_str=files("gqaprune.checkpoints").joinpath("templates/card.md").read_text(encoding="utf-8"),
        dense=dense,
        asked=" and ".join(asked) or "nothing",
        plan=plan,
        about=entry.about,
        loading=entry.loading.format(folder=name or folder.name, file=file),
        serving=_describe_serving(entry.serving, folder, name or folder.name, written),
        layers=_list_layers(plan),
        padding=describe_padding(plan.pruned_geometry, written, plan.geometry),
        remark=entry.describe(folder),
        stages=[stage.name for stage in stages],
        perplexities=_list_perplexities(stages),
        protocol="" if report is None else report.protocol.rstrip("."),
        command=shlex.join(command),
    )
    write_atomically(folder / CARD_FILE, f"{card}\n".encode())


def _describe_serving(command: str, folder: Path, name: str, written: Geometry) -> str:
    """The command that serves a checkpoint by vLLM; empty where it cannot."""
    config = folder / "config.json"
    if not command or (config.is_file() and "quantization_config" in json.loads(config.read_text(encoding="utf-8"))):
        return ""
    fills = all(heads * written.head_dim == written.hidden_size for heads in written.query_heads)
    is_right = fills or "--trust-remote-code" in command or written.family not in _VLLM_IGNORES_HEAD_DIM
    return command.format(folder=shlex.quote(name)) + ("" if is_right else " --model-impl transformers")


def _is_hub_name(model: str) -> bool:
    """Whether a model is not a folder here but `owner/name` on the hub, at a revision or not."""
    return (
        model.partition("@")[0].count("/") == 1 and not model.startswith((".", "~", "/")) and not Path(model).exists()
    )


def _list_layers(plan: PruningPlan) -> list[tuple[str, ...]]:
    """List the rows of a table, equal neighbours in one row."""
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
    return [(f"{first}" if first == last else f"{first}-{last}", *cells) for first, last, cells in rows]


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
    what = "layers are filled up with zeros to sizes that the format has"
    if written.is_uniform:
        heads = f"{written.query_heads[0]} query heads on {written.kv_heads[0]} KV heads"
        what = f"every layer has {heads} and {written.channels[0]:,} channels, those it lacks as zeros"
    removed = 0 if dense is None else dense.projection_weights - pruned.projection_weights
    share = f", {zeros / removed:.0%} of what pruning removed" if removed else ""
    return f"In the files {what}: {zeros / 1e6:,.2f} M parameters{share}."


def _list_perplexities(stages: Sequence[Stage]) -> list[list[str]]:
    """List the rows of a table: a corpus, then its perplexity at every stage."""
    rows = []
    for corpus in stages[0].perplexity if stages else ():
        values = [stage.perplexity.get(corpus) for stage in stages]
        rows.append([corpus, *("–" if value is None else f"{value:.2f}" for value in values)])
    return rows
