"""Save pruned models, atomically, as checkpoints that load without gqaprune.

The formats are in `formats.py`. Weights are safetensors or GGUF; nothing is pickled.
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
"""Default of the largest size of a weights file."""


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
    """Save a model as a checkpoint, atomically.

    If the model's decoder layers are sharded over devices, every rank must call it; rank 0 writes.

    Args:
        model: the pruned (or dense) model.
        tokenizer: tokenizer to save beside it, if given; GGUF needs one.
        folder: folder to write to. An earlier checkpoint with a plan is replaced when the new one is complete; any
            other content, above all a dense model, is never overwritten.
        plan: plan to save as `plan.json` and to describe in `README.md`, if given.
        state_dict: whole weights to save instead of the model's own, which may be sharded.
        adapted: peft's view of the model, if it has LoRA adapters: they are merged into the saved weights, and also
            saved in `adapter/` of the folder.
        format: one of `FORMATS`, or `auto`: the first automatic format that can store the model.
        max_shard_size: largest size of a weights file, such as `5GB`; if the decoder layers are not all in memory, each
            has a file of its own instead.
        quantization: `int8` stores the matrices of the decoder layers in 8 bits, with a scale for each row, with
            torchao.

    Returns:
        The format written, one of `FORMATS`.

    Raises:
        ValueError: if `folder` is a file, or has other content than a pruned checkpoint; if the format cannot store the
            model; if transformers refuses to save its config or its tokenizer; or if the model has PEFT adapters that
            are not given as `adapted`.
    """
    check_output_folder(Path(folder))
    folder = Path(folder).resolve()  # the target of a link
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
    """Raise an error for configs that transformers can load but not save, such as `output_attentions` with sdpa.

    Args:
        model: the model; its weights are not used.
        tokenizer: tokenizer to save beside it.
        format: one of `FORMATS`; those of single files are not written by transformers.

    Raises:
        ValueError: with the file to correct.
    """
    if not FORMATS[format].file:
        check_saves(model, tokenizer)


def measure_weights(folder: Path) -> int:
    """Return the bytes of the weights in a checkpoint's folder."""
    patterns = ("*.safetensors", *_list_file_patterns())
    return sum(file.stat().st_size for pattern in patterns for file in folder.glob(pattern))


def _list_file_patterns() -> list[str]:
    """List the patterns of files that are a whole checkpoint, without duplicates."""
    return sorted({entry.file for entry in FORMATS.values() if entry.file})


def check_output_folder(folder: Path) -> None:
    """Raise an error if a checkpoint in this folder would overwrite something else.

    Raises:
        ValueError: if it is a file or below a file, cannot be replaced, or is a folder with other content.
    """
    for place in (folder, folder.resolve().parent):  # the parent has the new checkpoint until it is complete
        check_can_be_folder(place)
    is_here = folder.resolve() == Path.cwd()
    if is_here or folder.resolve().is_mount():
        what = "the working directory" if is_here else "a mount point"
        raise ValueError(
            f"cannot write a checkpoint to {folder}: it is {what}, which cannot be replaced; choose a folder in it"
        )
    if folder.is_dir() and any(folder.iterdir()) and not _is_earlier_checkpoint(folder):
        raise ValueError(
            f"cannot write a checkpoint to {folder}: it has files that are not from an earlier run (no {PLAN_FILE} "
            "beside a model); choose an empty or new folder"
        )


def _is_earlier_checkpoint(folder: Path) -> bool:
    # A plan is not enough: a run's folder has one as well.
    is_model = (folder / "config.json").exists() or any(any(folder.glob(each)) for each in _list_file_patterns())
    return is_model and (folder / PLAN_FILE).exists()


def check_shard_size(size: str) -> None:
    """Raise an error if a size cannot be parsed.

    Raises:
        ValueError: with a valid size.
    """
    try:
        split_torch_state_dict_into_shards({}, max_shard_size=size)
    except ValueError:
        raise ValueError(f"max_shard_size must be a number with MB, GB or TB, got {size!r}; try 5GB") from None
