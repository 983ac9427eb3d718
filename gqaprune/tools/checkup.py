"""Whether a pruned checkpoint is whole: each layer's ratio, what went from its base, its tensors against its config."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table
from safetensors import safe_open
from transformers import PretrainedConfig

from gqaprune.architecture import read_geometry
from gqaprune.families import get_family
from gqaprune.loading import build_without_weights
from gqaprune.offload import find_tensors
from gqaprune.plan import PLAN_FILE, Geometry, PruningPlan


@dataclass(frozen=True)
class LayerCheck:
    """One layer of a checkpoint.

    Args:
        layer: index of the decoder layer.
        shape: its heads and channels, in words.
        removed: what went from the base's layer, in words; empty where nothing did or the base is not known.
        keeps_ratio: whether every KV head has as many query heads as the plan says, or in all other layers.
        wrong_tensors: tensors whose shapes are not those of the config, with both shapes.
    """

    layer: int
    shape: str
    removed: str
    keeps_ratio: bool
    wrong_tensors: tuple[str, ...] = ()


def read_plan_of(folder: Path) -> PruningPlan | None:
    """The plan that a pruned checkpoint carries; None where there is none."""
    return PruningPlan.load(folder / PLAN_FILE) if (folder / PLAN_FILE).is_file() else None


def check_layers(folder: Path, config: PretrainedConfig, plan: PruningPlan | None) -> list[LayerCheck]:
    """Check every layer of a checkpoint folder; its tensors' shapes are read, not the tensors.

    Args:
        folder: the checkpoint.
        config: its config.
        plan: what was cut; None where it is not known.
    """
    geometry = read_geometry(config)
    promised = geometry if plan is None else plan.pruned_geometry
    # All layers of a padded checkpoint are as large as its largest; what was cut is in the plan alone.
    is_padded = geometry.is_uniform and promised != geometry
    wrong = find_wrong_tensors(folder, config)
    usual = max(set(geometry.ratios), key=geometry.ratios.count)
    checks = []
    for layer in range(geometry.num_layers):
        asked = usual if plan is None else promised.ratios[layer]
        checks.append(
            LayerCheck(
                layer,
                _describe(geometry, layer),
                "" if plan is None else _describe_removed(plan.geometry, promised, layer),
                geometry.ratios[layer] == asked or is_padded,
                tuple(wrong.get(layer, ())),
            )
        )
    return checks


def find_wrong_tensors(folder: Path, config: PretrainedConfig) -> Mapping[int, list[str]]:
    """Layer -> its tensors whose shapes in the files are not those that the config promises."""
    try:
        files = find_tensors(folder)
    except ValueError:
        return {}  # no safetensors: a GGUF
    shapes = {name: list(tensor.shape) for name, tensor in build_without_weights(config).state_dict().items()}
    prefix = f"{get_family(config).layers}."
    wrong: dict[int, list[str]] = {}
    for path in sorted(set(files.values())):
        with safe_open(path, "pt") as file:
            for name in sorted(file.keys()):
                if not name.startswith(prefix) or name not in shapes:
                    continue
                if (found := file.get_slice(name).get_shape()) != shapes[name]:
                    layer = int(name.removeprefix(prefix).split(".")[0])
                    wrong.setdefault(layer, []).append(f"{name} is {found}, its config promises {shapes[name]}")
    return wrong


def build_layers_table(checks: list[LayerCheck], base: str) -> Table:
    """One row per layer."""
    caption = f"against {base}" if base else "what it was pruned from is not known"
    table = Table(title="layers", caption=caption, caption_style="dim", title_justify="left")
    for name in ("layer", "heads and channels", "removed", "ratio", "tensors"):
        table.add_column(name, justify="right" if name == "layer" else "left")
    for check in checks:
        table.add_row(
            str(check.layer),
            check.shape,
            check.removed or "–",
            "✅" if check.keeps_ratio else "❌",
            "❌ " + "; ".join(check.wrong_tensors) if check.wrong_tensors else "✅",
        )
    return table


def _describe(geometry: Geometry, layer: int) -> str:
    heads = f"{geometry.query_heads[layer]}Q:{geometry.kv_heads[layer]}KV ({geometry.ratios[layer]}:1)"
    return f"{heads}  MLP {geometry.channels[layer]:,}"


def _describe_removed(before: Geometry, after: Geometry, layer: int) -> str:
    parts = [
        f"{lost:,} of {getattr(before, name)[layer]:,} {words}"
        for name, words in (("query_heads", "query heads"), ("kv_heads", "KV heads"), ("channels", "channels"))
        if (lost := getattr(before, name)[layer] - getattr(after, name)[layer])
    ]
    return ", ".join(parts)
