"""The model card: `README.md` of a checkpoint's folder, with the front matter that the hub reads.

The text is `templates/card.md`. Jinja shows every text in it as it is; `Markup` marks what is Markdown, YAML or code.
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
from gqaprune.plan import Geometry, PruningPlan
from gqaprune.reporting.report import Report, Stage

CARD_FILE = "README.md"

_VLLM_IGNORES_HEAD_DIM = ("qwen2", "qwen2_moe")
"""Families whose class in vLLM divides the width by the query heads for a head_dim, whatever the config says."""
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
    """The code that loads a checkpoint, as its card shows it first."""
    entry = FORMATS[format]
    file = next((path.name for path in folder.glob(entry.file)), "") if entry.file else ""
    loading = entry.loading.format(**_spell_names(str(folder), file))
    found = _CODE.search(loading)
    return (found[1] if found else loading).strip()


def _spell_names(folder: str, file: str) -> dict[str, str]:
    """A checkpoint's folder and the file in it as Python and a shell write them."""
    path = f"./{folder}" if folder.startswith("-") else folder  # else it is an option
    return {
        "folder_string": for_python(folder),
        "file_string": for_python(file),
        "folder_word": for_shell(path),
        "file_word": for_shell(f"{path}/{file}"),
    }


def _describe_serving(command: str, folder: Path, written: Geometry) -> str:
    """The command that serves a checkpoint by vLLM, of a name to fill in; empty where it cannot."""
    config = folder / "config.json"
    if not command or (config.is_file() and "quantization_config" in json.loads(config.read_text(encoding="utf-8"))):
        return ""
    fills = all(heads * written.head_dim == written.hidden_size for heads in written.query_heads)
    is_right = fills or "--trust-remote-code" in command or written.family not in _VLLM_IGNORES_HEAD_DIM
    return command + ("" if is_right else " --model-impl transformers")


def _is_hub_name(model: str) -> bool:
    """Whether a model is not a folder here but `owner/name` on the hub, at a revision or not."""
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


def _show(value: object) -> object:
    return for_markdown(value) if isinstance(value, str) and not isinstance(value, Markup) else value


_TEMPLATES = Environment(loader=PackageLoader("gqaprune.checkpoints"), undefined=StrictUndefined, finalize=_show)
