"""Load dense and pruned models in any format, without unpickling, and without remote code unless it is trusted."""

import copy
import importlib.util
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    GgufConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import CONFIG_NAME

from gqaprune.models.architecture import read_geometry
from gqaprune.models.config_facts import check_kernel, correct_config
from gqaprune.models.dtypes import DTYPES, check_dtype
from gqaprune.models.families import get_family
from gqaprune.models.gguf_file import GgufHeader
from gqaprune.models.gguf_layout import HEAD
from gqaprune.models.gguf_reader import is_own, read_weights
from gqaprune.models.loading_guard import guard_loading
from gqaprune.models.per_layer import get_per_layer_class
from gqaprune.models.sources import (
    check_index,
    fetch,
    find_revision,
    find_tensors,
    load_config,
    locate,
    pin,
    read_gguf_header,
)
from gqaprune.models.stored_weights import (
    check_companions,
    check_layer_count,
    check_loaded,
    check_total,
    check_types,
    find_stored_type,
    read_infos,
    read_quantization,
)
from gqaprune.models.tokenizer import check_tokenizer, load_tokenizer

if TYPE_CHECKING:
    from transformers import TorchAoConfig

QUANTIZATIONS = ("int8",)
"""Supported quantizations of weights."""


def load(
    source: str | Path, dtype: str = "auto", trust_remote_code: bool = False, revision: str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model and its tokenizer, and check that they belong together.

    Args:
        source: model, as for `load_model`.
        dtype: type of the weights, as for `load_model`.
        trust_remote_code: run code that comes with the checkpoint.
        revision: revision, as for `load_model`.

    Raises:
        ValueError: like `load_model`, `load_tokenizer` and `check_tokenizer`.
    """
    source = pin(str(source), revision)
    model = load_model(source, dtype, trust_remote_code=trust_remote_code)
    tokenizer = load_tokenizer(source, trust_remote_code)
    check_tokenizer(tokenizer, model)
    return model, tokenizer


def load_model(
    source: str | Path,
    dtype: str = "auto",
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    quantization: str | None = None,
    revision: str | None = None,
) -> PreTrainedModel:
    """Load a dense or pruned causal LM of a supported family.

    Args:
        source: a folder, a `.gguf` file, a hub name, or `smollm2-135m` (the embedded model).
        dtype: `float32`, `bfloat16`, `float16`, or `auto` (the type in the checkpoint).
        attn_implementation: `sdpa`, `eager` or another attention kernel of transformers; None lets transformers choose.
        trust_remote_code: run code that comes with the checkpoint. gqaprune loads pruned checkpoints without it.
        quantization: `int8` stores the matrices of the decoder layers in 8 bits, with a scale for each row; such a
            model can be run, but not pruned or trained.
        revision: branch, tag or commit of a model on the hub, for its config, weights and code; the same as
            `owner/name@revision` as the source.

    Raises:
        ValueError: if the model does not exist, its files are broken, its family is not supported, or loading needs a
            package that is not installed.
    """
    check_dtype(dtype)
    check_kernel(attn_implementation, trust_remote_code)
    source = pin(str(source), revision)
    place, gguf = locate(source)
    config = load_config(source, trust_remote_code)
    arguments = {"dtype": DTYPES[dtype], "trust_remote_code": trust_remote_code}
    if quantization is not None:
        arguments["quantization_config"] = make_quantization_config(quantization)
    if attn_implementation is not None:
        arguments["attn_implementation"] = attn_implementation
    with guard_loading("model", source):
        family, _ = get_family(config), read_geometry(config)
        header, model_class = read_gguf_header(source), AutoModelForCausalLM
        is_ours = header is not None and is_own(header)
        if is_ours or config.is_heterogeneous:
            model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
            del arguments["trust_remote_code"]
        if config.is_heterogeneous:
            model_class = get_per_layer_class(model_class)
        if header is None:
            check_index(source)
            own_dtype = check_stored(find_tensors(fetch(source)), config, dtype, trust_remote_code)
            arguments |= {"config": config, "use_safetensors": True, "dtype": own_dtype, **find_revision(source)}
        else:
            check_total(header.most_weights, build_without_weights(config))
            own_dtype = DTYPES["float32" if dtype == "auto" else dtype]  # the same as for other GGUF files
            if is_ours:
                weights = _read_own_weights(header, config, own_dtype)
                arguments |= {"config": config, "state_dict": weights, "dtype": own_dtype}
            else:  # packed weights cannot be cut or trained
                arguments = {"quantization_config": GgufConfig(dequantize=True), **arguments, **gguf}
        # Tensors of another shape are refused below, by name; the error of transformers has no names.
        model, found = model_class.from_pretrained(
            None if is_ours else place, output_loading_info=True, ignore_mismatched_sizes=True, **arguments
        )
        check_keys(found, family.layers)
        check_companions(found["unexpected_keys"], model)
        check_loaded(model)
        correct_config(model)
    model.config.name_or_path = str(place)
    model.name_or_path = source if isinstance(place, str) else str(place)
    return model


def check_stored(
    files: Mapping[str, Path], config: PretrainedConfig, dtype: str, trust_remote_code: bool = False
) -> object:
    """Raise an error if tensors do not fit a config, from their headers, before any memory is allocated.

    Args:
        files: name -> safetensors file.
        config: config of the model.
        dtype: one of `DTYPES`.
        trust_remote_code: run code that comes with the model.

    Returns:
        The type to load them in; `auto` is the type of most weights in the files, whatever the config says.
    """
    infos = read_infos(files)
    check_types(infos, config)
    check_layer_count(infos, config)
    model = build_without_weights(config, trust_remote_code)
    check_total(sum(info.most_weights for info in infos.values()), model)
    if not find_other_storage(config):
        check_companions(infos, model)
    return (find_stored_type(infos) if dtype == "auto" else None) or DTYPES[dtype]


def check_keys(found: Mapping[str, Collection[Any]], layers: str) -> None:
    """Raise an error if weights do not fit the config; transformers would initialise missing ones at random.

    Raises:
        ValueError: with the first such weight.
    """
    if wrong := sorted(found["mismatched_keys"]):
        name, shape, promised = wrong[0]
        raise ValueError(
            f"{name} has shape {list(shape)} in its files, but the config says {list(promised)} ({len(wrong)} in all)"
        )
    if missing := sorted(found["missing_keys"]):
        others = f"; they have {min(found['unexpected_keys'])} instead" if found["unexpected_keys"] else ""
        raise ValueError(f"its files lack {missing[0]} ({len(missing)} in all), which the config needs{others}")
    strange = [name for name in found["unexpected_keys"] if name.startswith(f"{layers}.")]
    places = [name for name in strange if name.endswith((".weight", ".bias"))]  # buffers of old versions are harmless
    if places:
        raise ValueError(f"its files have {min(places)} ({len(places)} in all), which does not fit the config")


def _read_own_weights(header: GgufHeader, config: PretrainedConfig, dtype: Any) -> dict[str, Tensor]:
    """Read the weights in a file that gqaprune wrote, and check that they fit the config."""
    promised = build_without_weights(config).state_dict()
    if config.tie_word_embeddings:
        del promised[HEAD]
    weights = dict(read_weights(header, config, dtype))
    shapes = [(name, weights[name].shape, promised[name].shape) for name in weights.keys() & promised.keys()]
    found = {
        "mismatched_keys": [(name, stored, expected) for name, stored, expected in shapes if stored != expected],
        "missing_keys": promised.keys() - weights.keys(),
        "unexpected_keys": weights.keys() - promised.keys(),
    }
    check_keys(found, get_family(config).layers)
    return weights


def find_other_storage(config: PretrainedConfig) -> str:
    """Describe weights whose names or shapes in files differ from the model's; empty if there are none."""
    if get_family(config).has_experts:
        return "experts"
    return "quantised weights" if read_quantization(config) else ""


def build_model(
    config: PretrainedConfig,
    dtype: object,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Build a model of the class that `load_model` would load, with meaningless weights.

    Args:
        config: config of the model, dense or pruned.
        dtype: type of the weights; `auto` is the type in the config.
        attn_implementation: attention kernel; None lets transformers choose.
        trust_remote_code: run code that comes with the model.

    Raises:
        ValueError: if `dtype` is `auto` and the config has no type, or the kernel is code on the hub.
    """
    check_kernel(attn_implementation, trust_remote_code)
    if dtype == "auto" and (dtype := config.dtype) is None:
        raise ValueError("its config does not say which type the weights have: set dtype to bfloat16 or float32")
    arguments = {"dtype": dtype} | ({} if attn_implementation is None else {"attn_implementation": attn_implementation})
    config = copy.deepcopy(config)  # a copy, because transformers writes the type into it
    if config.is_heterogeneous:
        return get_per_layer_class(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)])._from_config(config, **arguments)
    code = getattr(config, "auto_map", {}).get("AutoModelForCausalLM", "")
    commit = getattr(config, "_commit_hash", None)
    if code and "--" not in code and commit is not None:  # the code is beside the config, at the same revision
        arguments["code_revision"] = commit
    return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code, **arguments)


def build_without_weights(
    config: PretrainedConfig, trust_remote_code: bool = False, attn_implementation: str | None = None
) -> PreTrainedModel:
    """Build the same model on the meta device, where parameters have only shapes.

    Raises:
        ValueError: if it cannot be built, with the source of its config.
    """
    with guard_loading("model", config.name_or_path or config.model_type, CONFIG_NAME), torch.device("meta"):
        return build_model(config, torch.float32, attn_implementation, trust_remote_code)


def make_quantization_config(quantization: str) -> "TorchAoConfig":
    """Make the config with which transformers quantises on loading.

    Raises:
        ValueError: if the quantisation does not exist, or torchao is not installed.
    """
    if quantization not in QUANTIZATIONS:
        raise ValueError(f"quantization must be one of {', '.join(QUANTIZATIONS)}, got {quantization!r}")
    if importlib.util.find_spec("torchao") is None:
        raise ValueError(f"quantization {quantization} needs torchao: pip install 'gqaprune[int8]'")
    from torchao.quantization import Int8WeightOnlyConfig  # type: ignore[import-untyped]
    from transformers import TorchAoConfig

    return TorchAoConfig(Int8WeightOnlyConfig())
