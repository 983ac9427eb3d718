"""Check a pruned checkpoint: each layer's ratio, the units removed from it, its tensors against its config."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.table import Table
from safetensors import safe_open
from transformers import PretrainedConfig
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from gqaprune.geometry import Geometry
from gqaprune.models.architecture import find_layer, read_geometry
from gqaprune.models.families import get_family
from gqaprune.models.loading import build_without_weights, check_stored, find_other_storage
from gqaprune.models.sources import complete_name, find_tensors, find_weights, match_tensors
from gqaprune.plan import PLAN_FILE, PruningPlan


@dataclass(frozen=True)
class LayerCheck:
    """One layer of a checkpoint.

    Args:
        layer: index of the decoder layer.
        shape: its heads and channels, in words.
        removed: units removed from the dense layer, in words; empty if there are none or the plan is not known.
        keeps_ratio: whether each KV head has as many query heads as the plan says; without a plan, as in other layers.
        wrong_tensors: tensors whose shapes differ from the config, with both shapes, and tensors that are missing.
    """

    layer: int
    shape: str
    removed: str
    keeps_ratio: bool
    wrong_tensors: tuple[str, ...] = ()


def read_plan_of(folder: Path) -> PruningPlan | None:
    """Read the plan in a pruned checkpoint's folder; None if it has none."""
    return PruningPlan.load(folder / PLAN_FILE) if (folder / PLAN_FILE).is_file() else None


def check_layers(
    config: PretrainedConfig, plan: PruningPlan | None, wrong: Mapping[int | None, Sequence[str]]
) -> list[LayerCheck]:
    """Check every layer of a checkpoint.

    Args:
        config: its config.
        plan: plan of the cut; None if it is not known.
        wrong: result of `find_wrong_tensors`.

    Raises:
        ValueError: if the plan has another number of layers.
    """
    geometry = read_geometry(config)
    promised = geometry if plan is None else plan.pruned_geometry
    if promised.num_layers != geometry.num_layers:
        raise ValueError(
            f"{PLAN_FILE} has {promised.num_layers} layers, but {CONFIG_NAME} has {geometry.num_layers}: one of them "
            "belongs to another model"
        )
    # All layers of a padded checkpoint are as large as its largest; only the plan has the units that were cut.
    is_padded = geometry.is_padding_of(promised)
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


def correct_by_weights(folder: Path, config: PretrainedConfig, trust_remote_code: bool = False) -> None:
    """Correct a config in place by its weights: their type, and whether head and embedding are tied.

    Args:
        folder: the checkpoint.
        config: its config.
        trust_remote_code: run code that comes with the checkpoint.

    Raises:
        ValueError: if a file is broken, or has tensors of a type that the config does not explain.
    """
    if not _has_weights(folder):
        return
    files = find_tensors(folder)
    config.dtype = check_stored(files, config, "auto", trust_remote_code)
    if getattr(config, "tie_word_embeddings", False):
        model = build_without_weights(config, trust_remote_code)
        stored = match_tensors(files, model)
        pairs = (model._tied_weights_keys or {}).items()
        held = [(stored[head], stored[embedding]) for head, embedding in pairs if {head, embedding} <= stored.keys()]
        config.tie_word_embeddings = all(torch.equal(head.read(), embedding.read()) for head, embedding in held)


def _has_weights(folder: Path) -> bool:
    return any((folder / name).exists() for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME))


def find_wrong_tensors(
    folder: Path, config: PretrainedConfig, trust_remote_code: bool = False
) -> dict[int | None, list[str]]:
    """Find tensors that differ from the config: layer -> sentences; None -> those outside of the layers.

    It reads only names and shapes. Experts and quantised weights are stored under other names than the model's; of
    these, only tensors with the model's names are checked.

    Args:
        folder: the checkpoint.
        config: its config.
        trust_remote_code: run code that comes with the checkpoint.

    Raises:
        ValueError: if a file is broken.
    """
    if not (folder / CONFIG_NAME).is_file():
        return {}  # a GGUF file
    found: dict[str, list[int]] = {}
    for path in find_weights(folder) if _has_weights(folder) else ():
        with safe_open(path, "pt") as file:
            found |= {name: file.get_slice(name).get_shape() for name in sorted(file.keys())}
    model, family = build_without_weights(config, trust_remote_code), get_family(config)
    promised = model.state_dict()
    found = {complete_name(name, promised, model): shape for name, shape in found.items()}
    wrong: dict[int | None, list[str]] = {}
    for name, tensor in promised.items():
        if (shape := found.get(name, list(tensor.shape))) != list(tensor.shape):
            sentence = f"{name} has shape {shape}, but the config says {list(tensor.shape)}"
            wrong.setdefault(find_layer(name, family.layers), []).append(sentence)
    if find_other_storage(config):
        return wrong
    parameters = dict(model.named_parameters(remove_duplicate=False))
    held = {id(parameters[name]) for name in found.keys() & parameters.keys()}  # a tied one has several names
    missing: dict[int | None, list[str]] = {}
    for name, parameter in model.named_parameters():
        if id(parameter) not in held:
            missing.setdefault(find_layer(name, family.layers), []).append(name)
    for layer, names in missing.items():
        wrong.setdefault(layer, []).append(f"{names[0]} is missing ({len(names)} in all)")
    return wrong


def build_layers_table(checks: list[LayerCheck], base: str) -> Table:
    """Build a table with one row per layer."""
    caption = f"compared with {base}" if base else "the dense model is not known"
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
