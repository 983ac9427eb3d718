"""Write a pruned model as a GGUF file, for llama.cpp and what builds on it.

Architectures: `llama` (Llama, and Mistral without sliding window) and `qwen2`. Layers are padded to equal shapes, and
to head counts that transformers' own reader of the format accepts, so that both read the same model; only Llama 3.1's
scaled rotary frequencies, which llama.cpp reads from the file, are not known to that one.

Source: the format, github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor
from transformers import AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from gqaprune.checkpoints.base import Content
from gqaprune.checkpoints.padding import find_padded_shapes, pad_checkpoint
from gqaprune.common.console import track
from gqaprune.common.errors import first_line
from gqaprune.models.architecture import read_geometry
from gqaprune.plan import Geometry

TYPES = {
    "f16": (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
    "q8_0": (gguf.GGMLQuantizationType.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
}
"""Name -> how matrices are stored; vectors are float32, and matrices whose rows are no whole blocks f16."""

_ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2"}
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SPLITS = {rf"{_WORDS}|\p{{N}}{{1,3}}|{_REST}": "llama-bpe", rf"{_WORDS}|\p{{N}}|{_REST}": "qwen2"}
"""Pattern that a byte-level tokenizer splits text by -> what the format calls it."""
_SAMPLE = "Pruned in 2026: 1234567890 heads — naïve?\n\n\tdef f(x):  return 'x'  # 漢字 🙂"
"""What the written tokenizer has to read as the given one does."""


@dataclass(frozen=True)
class _Entry:
    """A tensor of the file: its name there, its values and how they are stored."""

    name: str
    tensor: Tensor
    kind: gguf.GGMLQuantizationType


def write_gguf_checkpoint(content: Content, folder: Path, kind: str) -> None:
    """Write a model into a folder, as one file of matrices of a kind.

    Raises:
        ValueError: as `write_gguf`, or if there is no tokenizer.
    """
    if content.tokenizer is None:
        raise ValueError("a GGUF file holds the tokenizer too, got none; save with the model's tokenizer")
    config = content.model.config
    name = Path(str(config.name_or_path or "")).name
    write_gguf(folder / f"model-{kind}.gguf", config, content.state_dict, content.tokenizer, kind, name)


def write_gguf(
    file: Path,
    config: PretrainedConfig,
    state_dict: Mapping[str, Tensor],
    tokenizer: PreTrainedTokenizerBase,
    kind: str = "f16",
    name: str = "",
) -> Geometry:
    """Write config, weights and tokenizer into one file.

    Args:
        file: where to.
        config: of the pruned (or dense) model.
        state_dict: its whole weights.
        tokenizer: byte-level BPE with a pattern that the format knows, or BPE with byte fallback.
        kind: one of `TYPES`.
        name: of the model.

    Returns:
        The shapes in the file, padded where layers differ.

    Raises:
        ValueError: if the format has no place for the architecture, for something in it or for the tokenizer, or a
            weight does not fit float16.
    """
    architecture = check_architecture(config)
    config, weights = pad_checkpoint(config, state_dict, *_get_padding(architecture, kind))
    vocabulary = _read_vocabulary(tokenizer, config.vocab_size)
    entries = list(_list_entries(architecture, config, weights, TYPES[kind][0]))
    writer = gguf.GGUFWriter(file, architecture)
    try:
        _write_config(writer, config, name)
        writer.add_file_type(TYPES[kind][1])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        _write_vocabulary(writer, vocabulary, tokenizer)
        for entry in entries:
            data = _store(entry.tensor[:1] if entry.tensor.ndim > 1 else entry.tensor, entry)
            shape = (*entry.tensor.shape[:-1], data.shape[-1])
            writer.add_tensor_info(entry.name, shape, data.dtype, data.itemsize * math.prod(shape), entry.kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for entry in track(entries, "writing GGUF", "tensors"):
            writer.write_tensor_data(_store(entry.tensor, entry))
    finally:
        writer.close()
    _check_tokenizer(file, tokenizer)
    return read_geometry(config)


def find_gguf_shapes(config: PretrainedConfig, kind: str = "f16") -> Geometry:
    """Find the shapes that `write_gguf` gives a model of a config.

    Raises:
        ValueError: if the format has no place for the architecture or for the shapes.
    """
    return find_padded_shapes(config, *_get_padding(check_architecture(config), kind))


def _get_padding(architecture: str, kind: str) -> tuple[Callable[[Geometry], bool], int]:
    """The shapes that transformers' reader accepts, and what widths of MLPs are multiples of."""
    return _divides_width if architecture == "llama" else _fills_width, _get_block_size(TYPES[kind][0])


def _get_block_size(kind: gguf.GGMLQuantizationType) -> int:
    """Values that share a scale."""
    return gguf.GGML_QUANT_SIZES[kind][0]


def check_architecture(config: PretrainedConfig) -> str:
    """The format's name of the architecture.

    Raises:
        ValueError: naming what it has no place for.
    """
    architecture = _ARCHITECTURES.get(config.model_type)
    if architecture is None:
        raise ValueError(f"GGUF export knows {', '.join(_ARCHITECTURES)} models, got {config.model_type!r}; use padded")
    rope = config.rope_parameters.get("rope_type", "default")
    window = getattr(config, "sliding_window", None)
    for is_odd, what in (
        (window is not None and window < config.max_position_embeddings, "sliding windows"),
        (getattr(config, "attention_bias", False) or getattr(config, "mlp_bias", False), "its biases"),
        (rope not in ("default", "llama3"), f"rope of type {rope!r}"),
        (config.hidden_act != "silu", f"the activation {config.hidden_act!r}"),
    ):
        if is_odd:
            raise ValueError(f"a GGUF file of a {config.model_type} model has no place for {what}; use padded")
    return architecture


def _divides_width(geometry: Geometry) -> bool:
    return geometry.hidden_size % geometry.query_heads[0] == 0


def _fills_width(geometry: Geometry) -> bool:
    return geometry.query_heads[0] * geometry.head_dim == geometry.hidden_size


def _write_config(writer: gguf.GGUFWriter, config: PretrainedConfig, name: str) -> None:
    geometry = read_geometry(config)
    writer.add_name(f"{name or 'a model'}, pruned")  # transformers takes a bare "mistral" for something else
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(geometry.channels[0])
    writer.add_head_count(geometry.query_heads[0])
    writer.add_head_count_kv(geometry.kv_heads[0])
    writer.add_key_length(geometry.head_dim)
    writer.add_value_length(geometry.head_dim)
    writer.add_rope_dimension_count(geometry.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)


def _list_entries(
    architecture: str, config: PretrainedConfig, weights: Mapping[str, Tensor], kind: gguf.GGMLQuantizationType
) -> Iterator[_Entry]:
    """The tensors under their names in the file.

    Raises:
        ValueError: if a weight is not finite in float16.
    """
    geometry, vector = read_geometry(config), gguf.GGMLQuantizationType.F32
    model = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == architecture)
    names = gguf.get_tensor_name_map(model, config.num_hidden_layers)
    rearrange: dict[str, Callable[[Tensor], Tensor]] = {}
    if architecture == "llama":  # whose rotary pairs are neighbours there
        rearrange = {
            ".q_proj.": lambda tensor: _interleave(tensor, geometry.query_heads[0]),
            ".k_proj.": lambda tensor: _interleave(tensor, geometry.kv_heads[0]),
        }
    if config.rope_parameters.get("rope_type") == "llama3":
        yield _Entry("rope_freqs.weight", _compute_rope_factors(config.rope_parameters, geometry.head_dim), vector)
    for source, tensor in weights.items():
        if source == "lm_head.weight" and config.tie_word_embeddings:
            continue
        name = names.get_name(source, try_suffixes=(".weight", ".bias"))
        assert name is not None, f"the format has no name for {source}"
        if not tensor.to(torch.float16).isfinite().all():
            raise ValueError(f"{source} holds values that float16 cannot, which GGUF files store; use padded")
        change = next((change for part, change in rearrange.items() if part in source), None)
        fits = tensor.shape[-1] % _get_block_size(kind) == 0
        matrix = kind if fits else gguf.GGMLQuantizationType.F16
        yield _Entry(name, tensor if change is None else change(tensor), matrix if tensor.ndim > 1 else vector)


def _interleave(tensor: Tensor, heads: int) -> Tensor:
    """Rows of each head from halves (`0 … d/2`, `d/2 … d`) to pairs (`0, d/2, 1, d/2 + 1 …`)."""
    pairs: Tensor = tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(tensor.shape)
    return pairs


def _compute_rope_factors(rope: Mapping[str, Any], head_dim: int) -> Tensor:
    """What Llama 3.1 divides rotary frequencies by, `[head_dim / 2]`: 1 where waves are short, `factor` where long."""
    wave = 2 * math.pi * rope["rope_theta"] ** (torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    low, high, context = rope["low_freq_factor"], rope["high_freq_factor"], rope["original_max_position_embeddings"]
    smooth = ((context / wave - low) / (high - low)).clamp(0, 1)
    factors: Tensor = 1 / ((1 - smooth) / rope["factor"] + smooth)
    return factors.float()


def _store(tensor: Tensor, entry: _Entry) -> np.ndarray[Any, Any]:
    return gguf.quants.quantize(tensor.detach().float().cpu().contiguous().numpy(), entry.kind)


@dataclass(frozen=True)
class _Vocabulary:
    """A tokenizer in the format's terms."""

    model: str
    split: str
    tokens: list[str]
    types: list[int]
    merges: list[str]
    scores: list[float]


def _read_vocabulary(tokenizer: PreTrainedTokenizerBase, size: int) -> _Vocabulary:
    """What a tokenizer is made of, its tokens filled up to the embedding's rows.

    Raises:
        ValueError: if the format has no name for its kind.
    """
    backend: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str()) if tokenizer.is_fast else {}
    model = backend.get("model", {"type": "slow"})
    if model["type"] != "BPE":
        raise ValueError(f"a GGUF file needs a BPE tokenizer, got one of type {model['type']!r}; use padded")
    tokens = [f"[PAD{index}]" for index in range(max(size, len(tokenizer)))]
    types = [int(gguf.TokenType.UNUSED)] * len(tokens)
    for token, index in model["vocab"].items():
        is_byte = model.get("byte_fallback", False) and len(token) == 6 and token.startswith("<0x")
        tokens[index], types[index] = token, int(gguf.TokenType.BYTE if is_byte else gguf.TokenType.NORMAL)
    for added in backend["added_tokens"]:
        own = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
        tokens[added["id"]], types[added["id"]] = added["content"], int(own)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    if model.get("byte_fallback"):
        ranks = {merge.replace(" ", "", 1): rank for rank, merge in reversed(list(enumerate(merges)))}
        return _Vocabulary("llama", "default", tokens, types, merges, [-float(ranks.get(token, 0)) for token in tokens])
    return _Vocabulary("gpt2", _name_split(backend["pre_tokenizer"]), tokens, types, merges, [])


def _name_split(step: Mapping[str, Any] | None) -> str:
    """What the format calls the way in which a byte-level tokenizer splits text."""
    steps = step["pretokenizers"] if step is not None and step["type"] == "Sequence" else [step or {"type": "none"}]
    kinds = [each["type"] for each in steps]
    if kinds == ["ByteLevel"] and steps[0]["use_regex"]:
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and steps[0]["individual_digits"] and steps[1]["use_regex"]:
        return "smollm"
    if kinds == ["Split", "ByteLevel"] and (name := _SPLITS.get(steps[0]["pattern"].get("Regex", ""))):
        return name
    raise ValueError(
        f"the GGUF format has no name for how this tokenizer splits text ({' and '.join(kinds)}); use padded"
    )


def _write_vocabulary(writer: gguf.GGUFWriter, own: _Vocabulary, tokenizer: PreTrainedTokenizerBase) -> None:
    writer.add_tokenizer_model(own.model)
    writer.add_tokenizer_pre(own.split)
    writer.add_token_list(own.tokens)
    writer.add_token_types(own.types)
    if own.scores:
        writer.add_token_scores(own.scores)
    writer.add_token_merges(own.merges)
    for add, index in (
        (writer.add_bos_token_id, tokenizer.bos_token_id),
        (writer.add_eos_token_id, tokenizer.eos_token_id),
        (writer.add_unk_token_id, tokenizer.unk_token_id),
        (writer.add_pad_token_id, tokenizer.pad_token_id),
    ):
        if index is not None:
            add(index)
    first = tokenizer("a")["input_ids"][0]
    writer.add_add_bos_token(tokenizer.bos_token_id is not None and first == tokenizer.bos_token_id)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def _check_tokenizer(file: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Read the tokenizer back.

    Raises:
        ValueError: if it cannot be, or reads text in another way.
    """
    try:
        written = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"the tokenizer cannot be read from a GGUF file ({type(error).__name__}: {first_line(error)}); use padded"
        ) from None
    expected, found = (each(_SAMPLE, add_special_tokens=False)["input_ids"] for each in (tokenizer, written))
    if expected != found:
        raise ValueError(
            "the tokenizer would read text in another way from the GGUF file, which does not hold all that it does; "
            "use padded"
        )
