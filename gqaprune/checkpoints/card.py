"""Write the model card: `README.md` of a checkpoint's folder, with the front matter that the hub reads.

The text is `templates/card.md`. Strings are escaped in it; `Markup` marks those that are Markdown, YAML or code.
"""

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import ModelCardData
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from gqaprune.checkpoints.formats import FORMATS
from gqaprune.common.atomic_files import write_atomically
from gqaprune.common.safe_text import for_markdown, for_python, for_shell
from gqaprune.geometry import Geometry
from gqaprune.plan import PruningPlan
from gqaprune.reporting.report import Report, Stage

CARD_FILE = "README.md"

_VLLM_IGNORES_HEAD_DIM = ("qwen2", "qwen2_moe")
"""Families whose class in vLLM computes head_dim as width divided by query heads, whatever the config says."""
_CODE = re.compile(r"```\w*\n(.*?)```", re.DOTALL)
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
        folder: folder of the checkpoint.
        plan: plan of the cut.
        format: format of the checkpoint.
        written: shapes in its files.
        report: measured stages.
        command: command that made it.
        name: final name of the folder, if it is still a temporary one.
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
    names = _spell_names(name or folder.name, file)
    card = _TEMPLATES.get_template("card.md").render(
        card_data=Markup(data.to_yaml()),
        dense=dense,
        asked=" and ".join(asked) or "nothing",
        plan=plan,
        about=entry.about,
        loading=Markup(entry.loading.format(**names)),
        serving=Markup(_describe_serving(entry.serving, folder, written).format(**names)),
        layers=_list_layers(plan),
        padding=describe_padding(plan.pruned_geometry, written, plan.geometry),
        remark=entry.describe(folder),
        stages=[stage.name for stage in stages],
        perplexities=_list_perplexities(stages),
        protocol="" if report is None else report.protocol.rstrip("."),
        command=Markup(" ".join(map(for_shell, command))),
    )
    write_atomically(folder / CARD_FILE, f"{card}\n".encode())


def find_loading_code(folder: Path, format: str) -> str:
    """Return the first code block of a checkpoint's card that loads it."""
    entry = FORMATS[format]
    file = next((path.name for path in folder.glob(entry.file)), "") if entry.file else ""
    loading = entry.loading.format(**_spell_names(str(folder), file))
    found = _CODE.search(loading)
    return (found[1] if found else loading).strip()


def _spell_names(folder: str, file: str) -> dict[str, str]:
    """Quote the names of a checkpoint's folder and file for Python and for a shell."""
    path = f"./{folder}" if folder.startswith("-") else folder  # so that a shell does not take it for an option
    return {
        "folder_string": for_python(folder),
        "file_string": for_python(file),
        "folder_word": for_shell(path),
        "file_word": for_shell(f"{path}/{file}"),
    }


def _describe_serving(command: str, folder: Path, written: Geometry) -> str:
    """Return the command that serves a checkpoint with vLLM, with a placeholder; empty if vLLM cannot."""
    config = folder / "config.json"
    if not command or (config.is_file() and "quantization_config" in json.loads(config.read_text(encoding="utf-8"))):
        return ""
    fills = all(heads * written.head_dim == written.hidden_size for heads in written.query_heads)
    is_right = fills or "--trust-remote-code" in command or written.family not in _VLLM_IGNORES_HEAD_DIM
    return command + ("" if is_right else " --model-impl transformers")


def _is_hub_name(model: str) -> bool:
    """Return whether a model is not a local folder but `owner/name` on the hub, with or without a revision."""
    is_name = model.partition("@")[0].count("/") == 1
    return is_name and not model.startswith((".", "~", "/")) and not os.path.exists(model)


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
    """Describe the padding in the files in a sentence; empty if there is none.

    Args:
        pruned: shapes of the model.
        written: shapes in its files.
        dense: shapes before pruning, if they are known.
    """
    zeros = written.projection_weights - pruned.projection_weights
    if not zeros:
        return ""
    what = "layers are padded with zeros to sizes that the format allows"
    if written.is_uniform:
        heads = f"{written.query_heads[0]} query heads, {written.kv_heads[0]} KV heads"
        what = f"every layer is padded with zeros to {heads} and {written.channels[0]:,} channels"
    removed = 0 if dense is None else dense.projection_weights - pruned.projection_weights
    share = f", {zeros / removed:.0%} of the parameters that pruning removed" if removed else ""
    return f"In the files, {what}: {zeros / 1e6:,.2f} M parameters{share}."


def _list_perplexities(stages: Sequence[Stage]) -> list[list[str]]:
    """List the rows of a table: a corpus, then its perplexity at every stage."""
    rows = []
    for corpus in stages[0].perplexity if stages else ():
        values = [stage.perplexity.get(corpus) for stage in stages]
        rows.append([corpus, *("–" if value is None else f"{value:.2f}" for value in values)])
    return rows


def _show(value: object) -> object:
    return for_markdown(value) if isinstance(value, str) and not isinstance(value, Markup) else value


_TEMPLATES = Environment(loader=PackageLoader("gqaprune.checkpoints"), undefined=StrictUndefined, finalize=_show)
