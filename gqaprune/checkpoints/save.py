"""Save pruned models as checkpoints that load without gqaprune, whole or not at all.

Formats: `stock` for equal counts in every layer; `per-layer` for unequal ones, `per_layer_config` and a small modeling
file beside the weights; `padded`, a stock class with zeros for what some layers lack; GGUF. Weights are safetensors.
"""

import copy
import shutil
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import split_torch_state_dict_into_shards
from peft import PeftModel
from torch import Tensor
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from gqaprune.checkpoints.adapters import ADAPTER_FOLDER, merge_adapters, save_adapters
from gqaprune.checkpoints.card import write_card
from gqaprune.checkpoints.gguf_writer import TYPES, check_architecture, write_gguf
from gqaprune.checkpoints.padding import pad_checkpoint
from gqaprune.common.atomic_files import check_can_be_folder, replace_folder
from gqaprune.common.distributed import get_rank_and_world_size
from gqaprune.models.architecture import make_stock_config, read_geometry
from gqaprune.models.loading import load_model, make_quantization_config
from gqaprune.models.per_layer import MODELING_FILE, point_to_modeling_file, write_modeling_source
from gqaprune.models.sources import load_config
from gqaprune.placement.layer_store import Placement, find_store
from gqaprune.placement.writing_by_layer import attend_writing, write_weights
from gqaprune.plan import PLAN_FILE, Geometry, PruningPlan

FORMATS = ("auto", "stock", "per-layer", "padded", *(f"gguf-{kind}" for kind in TYPES))
"""What `save` can write; `auto` is `stock` where counts are equal in every layer, else `per-layer`."""

SHARD_SIZE = "5GB"
"""Size above which weights are split into several files, unless said otherwise."""


def save(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: str | Path,
    plan: PruningPlan | None = None,
    state_dict: dict[str, Tensor] | None = None,
    adapted: PeftModel | None = None,
    format: str = "auto",
    max_shard_size: str = SHARD_SIZE,
    quantization: str | None = None,
) -> str:
    """Save a model as a checkpoint, whole or not at all.

    Where a model's decoder layers are sharded over devices, every rank has to call it; rank 0 writes.

    Args:
        model: the pruned (or dense) model.
        tokenizer: saved beside it, if given; GGUF needs one.
        folder: where to; an earlier checkpoint there that has a plan is replaced once the new one is complete. Any
            other model is left alone, the dense one above all.
        plan: saved as `plan.json`, if given, and told in `README.md`.
        state_dict: whole weights to save instead of the model's own, which may be sharded.
        adapted: peft's view of the model, if it has LoRA adapters: they are merged into the weights that are saved, and
            saved by themselves in `adapter/` of the folder.
        format: one of `FORMATS`.
        max_shard_size: weights above it are split into several files, such as `5GB`; where a model's decoder layers
            are not all in memory, each gets a file instead.
        quantization: `int8` stores the matrices of the decoder layers in 8 bits, each row with its own scale, through
            torchao.

    Returns:
        The format written, one of `FORMATS` but not `auto`.

    Raises:
        ValueError: if `folder` is a file, or holds something else than a pruned checkpoint; or if the format cannot
            hold the model, with those that can.
    """
    check_output_folder(Path(folder))
    folder = Path(folder).resolve()  # of a link what it points to
    check_shard_size(max_shard_size)
    store = find_store(model)
    check_written_by_layer(format, quantization, store.placement)
    format = choose_format(model.config, format, quantization)
    if not store.is_in_memory and get_rank_and_world_size()[0] != 0:
        attend_writing(model)
        return format
    folder.parent.mkdir(parents=True, exist_ok=True)
    whole = model.state_dict() if state_dict is None else state_dict
    with replace_folder(folder) as temporary:
        if adapted is not None:
            save_adapters(adapted, whole, temporary / ADAPTER_FOLDER)
            whole = merge_adapters(adapted, whole)
        geometry = _write_weights(model, tokenizer, whole, temporary, format, max_shard_size)
        if quantization is not None:
            _quantize_weights(temporary, quantization, max_shard_size, _has_own_code(model.config))
        if plan is not None:
            plan.save(temporary / PLAN_FILE)
            write_card(temporary, plan, format, geometry, name=folder.name)
    return format


def choose_format(config: PretrainedConfig, format: str, quantization: str | None = None) -> str:
    """The format that is meant by a name, on a model of this config.

    Raises:
        ValueError: if there is no such format, it cannot hold the model, or not with this quantisation.
    """
    if quantization is not None:
        make_quantization_config(quantization)
        if format.startswith("gguf-"):
            raise ValueError(
                f"{format} and quantization {quantization} both say how weights are stored: set one of them"
            )
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    if format.startswith("gguf-"):
        check_architecture(config)
    can_be_stock = make_stock_config(config) is not None
    if format == "auto":
        return "stock" if can_be_stock else "padded" if _has_own_code(config) else "per-layer"
    if format == "per-layer" and not config.is_heterogeneous:
        return "stock"  # which is what that would be, without a file of its own
    if format == "per-layer" and _has_own_code(config):
        raise ValueError(
            f"per-layer writes a modeling file for classes of transformers, {type(config).__name__} comes with code of "
            "its own; padded adds zeros"
        )
    if format == "stock" and not can_be_stock:
        raise ValueError(
            f"{_describe_difference(read_geometry(config))}; per-layer keeps it as it is, padded adds zeros"
        )
    return format


def _has_own_code(config: PretrainedConfig) -> bool:
    """Whether a model is of classes that came with it, which the user has trusted, not of transformers'."""
    return not type(config).__module__.startswith("transformers.")


def check_written_by_layer(format: str, quantization: str | None, placement: Placement) -> None:
    """Refuse what cannot be written layer by layer, where a model's decoder layers are not all in memory.

    Raises:
        ValueError: with what can, and how to get there from it.
    """
    if placement is Placement.MEMORY:
        return
    for name, value, way_out in (
        ("format", format if format not in ("auto", "stock", "per-layer") else None, "auto, stock or per-layer"),
        ("quantization", quantization, "null"),
    ):
        if value is not None:
            raise ValueError(
                f"{name} {value} needs the whole model in memory, which {placement.value} avoids: set it to {way_out}, "
                f"and where there is memory for it, gqaprune export --{name} {value}"
            )


def _describe_difference(geometry: Geometry) -> str:
    if geometry.is_uniform:
        return (
            f"no stock {geometry.family} has {geometry.query_heads[0]} query heads on a hidden size of "
            f"{geometry.hidden_size}"
        )
    shapes = list(zip(geometry.query_heads, geometry.kv_heads, geometry.channels, strict=True))
    common = max(shapes, key=lambda shape: (shapes.count(shape), shape))
    others = [index for index, shape in enumerate(shapes) if shape != common]
    queries, groups, channels = common
    return (
        f"a stock checkpoint needs equal counts in every layer: layers {_join(others)} differ from {queries} query "
        f"heads, {groups} KV heads and {channels} channels"
    )


def _join(numbers: Sequence[int]) -> str:
    """Ascending numbers with runs joined: `0-3, 7`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def measure_weights(folder: Path) -> int:
    """Bytes of the weights in a checkpoint's folder."""
    return sum(file.stat().st_size for pattern in ("*.safetensors", "*.gguf") for file in folder.glob(pattern))


def check_output_folder(folder: Path) -> None:
    """Refuse a place where a checkpoint would overwrite something else.

    Raises:
        ValueError: if it is a file, lies below a file, cannot be replaced, or is a folder with other content.
    """
    check_can_be_folder(folder)
    is_here = folder.resolve() == Path.cwd()
    if is_here or folder.resolve().is_mount():
        what = "the working directory" if is_here else "a mount point"
        raise ValueError(
            f"cannot write a checkpoint to {folder}: it is {what}, which cannot be replaced; name a folder in it"
        )
    if folder.is_dir() and any(folder.iterdir()) and not _is_earlier_checkpoint(folder):
        raise ValueError(
            f"cannot write a checkpoint to {folder}: it holds files that are not from an earlier run (no {PLAN_FILE} "
            "beside a model); choose an empty or new folder"
        )


def _is_earlier_checkpoint(folder: Path) -> bool:
    is_model = (folder / "config.json").exists() or any(folder.glob("*.gguf"))  # a run's folder has a plan, too
    return is_model and (folder / PLAN_FILE).exists()


def check_shard_size(size: str) -> None:
    """Refuse a size that means nothing.

    Raises:
        ValueError: with one that does.
    """
    try:
        split_torch_state_dict_into_shards({}, max_shard_size=size)
    except ValueError:
        raise ValueError(f"max_shard_size must be a number and MB, GB or TB, such as 5GB, got {size!r}") from None


def _write_weights(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    state_dict: dict[str, Tensor],
    folder: Path,
    format: str,
    max_shard_size: str,
) -> Geometry:
    """Write config, weights and tokenizer; the shapes in the files."""
    config = model.config
    if format.startswith("gguf-"):
        if tokenizer is None:
            raise ValueError("a GGUF file holds the tokenizer too, got none; save with the model's tokenizer")
        kind = format.removeprefix("gguf-")
        return write_gguf(folder / f"model-{kind}.gguf", config, state_dict, tokenizer, kind, _name_model(model))
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    if format == "per-layer":
        base = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        config = copy.deepcopy(config)
        point_to_modeling_file(config, base)
        (folder / MODELING_FILE).write_text(write_modeling_source(base), encoding="utf-8")
    else:
        if format == "padded":
            config, state_dict = pad_checkpoint(config, state_dict)
        else:
            stock = make_stock_config(config)
            assert stock is not None
            config = stock
        config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].__name__]
    _save_pretrained(model, config, folder, state_dict, max_shard_size)
    return read_geometry(config)


def _quantize_weights(folder: Path, quantization: str, max_shard_size: str, remote: bool) -> None:
    """Write the weights of a checkpoint anew, quantised; all else stays."""
    model = load_model(folder, trust_remote_code=remote, quantization=quantization)
    for file in [*folder.glob("*.safetensors"), *folder.glob("*.safetensors.index.json")]:
        file.unlink()
    config = load_config(folder, remote)
    config.quantization_config = model.config.quantization_config
    _save_pretrained(model, config, folder, None, max_shard_size)


def _name_model(model: PreTrainedModel) -> str:
    return Path(str(model.config.name_or_path or "")).name


def _save_pretrained(
    model: PreTrainedModel,
    config: PretrainedConfig,
    folder: Path,
    state_dict: dict[str, Tensor] | None,
    max_shard_size: str,
) -> None:
    architectures = config.architectures
    own_config, model.config = model.config, config
    try:
        if find_store(model).is_in_memory:
            model.save_pretrained(folder, state_dict=state_dict, max_shard_size=max_shard_size)
        else:
            write_weights(model, folder)
            model.generation_config.save_pretrained(folder)
    finally:
        model.config = own_config
    # save_pretrained writes the class in memory; the checkpoint may be for another one.
    config.architectures = architectures
    config.save_pretrained(folder)
    for file in folder.iterdir():  # weights are written for their owner only; they may be read like their config
        if file.is_file():
            shutil.copymode(folder / "config.json", file)
