"""Save pruned models as checkpoints that load without gqaprune, whole or not at all.

`formats.py` has the formats. Weights are safetensors or GGUF; nothing is pickled.
"""

from pathlib import Path

from huggingface_hub import split_torch_state_dict_into_shards
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gqaprune.checkpoints.adapters import ADAPTER_FOLDER, merge_adapters, save_adapters
from gqaprune.checkpoints.base import Content
from gqaprune.checkpoints.card import write_card
from gqaprune.checkpoints.formats import AUTO, FORMATS, check_written_by_layer, choose_format
from gqaprune.checkpoints.safetensors_writer import quantize_checkpoint
from gqaprune.common.atomic_files import check_can_be_folder, remove_leftovers, replace_folder
from gqaprune.common.distributed import get_rank_and_world_size
from gqaprune.models.config_facts import correct_config, has_own_code
from gqaprune.models.saving import check_saves
from gqaprune.models.wrapping import check_no_adapters
from gqaprune.placement.layer_store import find_store
from gqaprune.placement.writing_by_layer import attend_writing
from gqaprune.plan import PLAN_FILE, PruningPlan

SHARD_SIZE = "5GB"
"""Size above which weights are split into several files, unless said otherwise."""


def save(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: str | Path,
    plan: PruningPlan | None = None,
    state_dict: dict[str, Tensor] | None = None,
    adapted: PeftModel | None = None,
    format: str = AUTO,
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
        format: one of `FORMATS`, or `auto`: the first automatic one of them that can hold the model.
        max_shard_size: weights above it are split into several files, such as `5GB`; where a model's decoder layers
            are not all in memory, each gets a file instead.
        quantization: `int8` stores the matrices of the decoder layers in 8 bits, each row with its own scale, through
            torchao.

    Returns:
        The format written, one of `FORMATS`.

    Raises:
        ValueError: if `folder` is a file, or holds something else than a pruned checkpoint; if the format cannot hold
            the model, with those that can; if transformers refuses to save its config or its tokenizer; or if the model
            has PEFT adapters that `adapted` does not view.
    """
    check_output_folder(Path(folder))
    folder = Path(folder).resolve()  # of a link what it points to
    check_shard_size(max_shard_size)
    if adapted is None:
        check_no_adapters(model)
    store = find_store(model)
    check_written_by_layer(format, quantization, store.placement)
    whole = model.state_dict() if state_dict is None else state_dict
    correct_config(model, whole)
    format = choose_format(model.config, format, quantization, store.placement)
    check_can_be_saved(model, tokenizer, format)
    if not store.is_in_memory and get_rank_and_world_size()[0] != 0:
        attend_writing(model)
        return format
    folder.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder.parent)
    size = sum(weight.nbytes for weight in whole.values())
    with replace_folder(folder, size) as temporary:
        if adapted is not None:
            save_adapters(adapted, whole, temporary / ADAPTER_FOLDER)
            whole = merge_adapters(adapted, whole)
        FORMATS[format].write(Content(model, whole, tokenizer, max_shard_size), temporary)
        if quantization is not None:
            quantize_checkpoint(temporary, quantization, max_shard_size, has_own_code(model.config))
        if plan is not None:
            plan.save(temporary / PLAN_FILE)
            shapes = FORMATS[format].read_shapes(model.config)
            write_card(temporary, plan, format, shapes, name=folder.name)
    return format


def check_can_be_saved(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, format: str) -> None:
    """Refuse what transformers loads and computes with but does not save, such as `output_attentions` under sdpa.

    Args:
        model: whose weights are not looked at.
        tokenizer: that is to be saved beside it.
        format: one of `FORMATS`; single files are not written by transformers.

    Raises:
        ValueError: with the file to correct.
    """
    if not FORMATS[format].file:
        check_saves(model, tokenizer)


def measure_weights(folder: Path) -> int:
    """Bytes of the weights in a checkpoint's folder."""
    patterns = ("*.safetensors", *_list_file_patterns())
    return sum(file.stat().st_size for pattern in patterns for file in folder.glob(pattern))


def _list_file_patterns() -> list[str]:
    """Patterns of the files that are a whole checkpoint each, every one once."""
    return sorted({entry.file for entry in FORMATS.values() if entry.file})


def check_output_folder(folder: Path) -> None:
    """Refuse a place where a checkpoint would overwrite something else.

    Raises:
        ValueError: if it is a file, lies below a file, cannot be replaced, or is a folder with other content.
    """
    for place in (folder, folder.resolve().parent):  # the latter has the new one until that is complete
        check_can_be_folder(place)
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
    # A run's folder has a plan, too.
    is_model = (folder / "config.json").exists() or any(any(folder.glob(each)) for each in _list_file_patterns())
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
