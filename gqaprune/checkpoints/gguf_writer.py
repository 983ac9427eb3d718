"""Write a pruned model as a GGUF file, for llama.cpp and programs based on it.

Every layer keeps its own sizes in the file if an architecture of llama.cpp supports that (see the table in
`models/gguf_layout.py`). None does for untied Qwen3, nor does transformers' own reader, for which `padded` is made: for
these, layers are padded with zeros to equal shapes, which for transformers must have head counts that it accepts.

Source: the format, github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from gqaprune.checkpoints.base import Content
from gqaprune.checkpoints.gguf_vocabulary import check_written_tokenizer, read_vocabulary, write_vocabulary
from gqaprune.checkpoints.padding import find_padded_shapes, pad_checkpoint, pad_state_dict
from gqaprune.common.console import track
from gqaprune.geometry import Geometry
from gqaprune.models.architecture import read_geometry
from gqaprune.models.gguf_file import read_header
from gqaprune.models.gguf_layout import CONFIG_KEY, EMBEDDING, FAMILIES, HEAD, ROPE_FACTORS, UNEQUAL, pack_tensors
from gqaprune.models.gguf_reader import describe_config, read_config, read_weights

TYPES = {
    "f16": (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
    "q8_0": (gguf.GGMLQuantizationType.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
}
"""Name -> type of matrices; vectors are float32, and matrices whose rows are not whole blocks are f16."""

_EQUAL = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
_SCALES_ROPE = ("llama", "deci")
"""Architectures that read Llama 3.1's scaled rotary frequencies from the file."""
_ROUNDING = 1 / 200
"""Bound of a stored value's error relative to the largest of its tensor; half a step of 8 bits is 1 / 254."""


@dataclass(frozen=True)
class _Entry:
    """A tensor of the file: its name there, its values and how they are stored."""

    name: str
    tensor: Tensor
    kind: gguf.GGMLQuantizationType


def write_gguf_checkpoint(
    content: Content, folder: Path, kind: str, is_padded: bool = False, channel_multiple: int = 1
) -> None:
    """Write a model into a folder, as one file of matrices of a kind.

    Raises:
        ValueError: like `write_gguf`, or if there is no tokenizer.
    """
    if content.tokenizer is None:
        raise ValueError("a GGUF file needs a tokenizer, got None: save with the model's tokenizer")
    config = content.model.config
    name = Path(str(config.name_or_path or "")).name
    file, weights = folder / f"model-{kind}.gguf", content.state_dict
    write_gguf(file, config, weights, content.tokenizer, kind, name, is_padded, channel_multiple)


def write_gguf(
    file: Path,
    config: PretrainedConfig,
    state_dict: Mapping[str, Tensor],
    tokenizer: PreTrainedTokenizerBase,
    kind: str = "f16",
    name: str = "",
    is_padded: bool = False,
    channel_multiple: int = 1,
) -> Geometry:
    """Write config, weights and tokenizer into one file, and read them back.

    Args:
        file: file to write.
        config: config of the pruned (or dense) model.
        state_dict: its whole weights.
        tokenizer: byte-level BPE with a pattern that the format knows, or BPE with byte fallback.
        kind: one of `TYPES`.
        name: name of the model.
        is_padded: pad every layer to sizes that transformers' own reader accepts.
        channel_multiple: widths of MLPs in the file become multiples of it, and of the kind's blocks.

    Returns:
        The shapes in the file.

    Raises:
        ValueError: if the format cannot store the architecture, a part of it or the tokenizer, or a weight is too
            large for float16.
    """
    config, weights = copy.deepcopy(config), dict(state_dict)
    config.tie_word_embeddings = HEAD not in weights or torch.equal(weights[HEAD], weights[EMBEDDING])
    if config.tie_word_embeddings:
        weights.pop(HEAD, None)
    architecture, shapes = (
        choose_architecture(config, is_padded),
        find_gguf_shapes(config, kind, is_padded, channel_multiple),
    )
    if _needs_padding(architecture, read_geometry(config), is_padded):
        padding = _get_padding(architecture, kind, is_padded, channel_multiple)
        config, weights = pad_checkpoint(config, weights, *padding)
    vocabulary = read_vocabulary(tokenizer, config.vocab_size)
    rounded = pad_state_dict(weights, config, read_geometry(config), shapes)
    entries = list(_list_entries(architecture, config, rounded, TYPES[kind][0]))
    writer = gguf.GGUFWriter(file, architecture)
    try:
        _write_config(writer, architecture, config, shapes, name)
        writer.add_file_type(TYPES[kind][1])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        write_vocabulary(writer, vocabulary, tokenizer)
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
    check_written_tokenizer(file, tokenizer, is_padded)
    _check_written(file, config, weights)
    return shapes


def find_gguf_shapes(
    config: PretrainedConfig, kind: str = "f16", is_padded: bool = False, channel_multiple: int = 1
) -> Geometry:
    """Find the shapes in the file that `write_gguf` writes for a config.

    Raises:
        ValueError: if the format cannot store the architecture or the shapes.
    """
    architecture, geometry = choose_architecture(config, is_padded), read_geometry(config)
    condition, block = _get_padding(architecture, kind, is_padded, channel_multiple)
    if _needs_padding(architecture, geometry, is_padded):
        return find_padded_shapes(config, condition, block)
    return replace(geometry, channels=tuple(-(-width // block) * block for width in geometry.channels))


def choose_architecture(config: PretrainedConfig, is_padded: bool = False) -> str:
    """Choose the architecture of the format that can store a model, and return its name.

    Raises:
        ValueError: with the part of the model that it cannot store.
    """
    families = [
        family for family in FAMILIES if not (is_padded and family == "qwen3")
    ]  # transformers misreads its heads
    if config.model_type not in families:
        raise ValueError(f"GGUF export supports {', '.join(families)} models, got {config.model_type!r}; use padded")
    rope = config.rope_parameters.get("rope_type", "default")
    architecture = _EQUAL[config.model_type]
    if not is_padded and not _takes(architecture, read_geometry(config), rope):
        architecture = "deci" if architecture != "qwen3" else "openelm" if config.tie_word_embeddings else "qwen3"
    window = getattr(config, "sliding_window", None)
    for is_odd, what in (
        (window is not None and window < config.max_position_embeddings, "sliding windows"),
        (getattr(config, "attention_bias", False) or getattr(config, "mlp_bias", False), "its biases"),
        (rope != "default" and not (rope == "llama3" and architecture in _SCALES_ROPE), f"rope of type {rope!r}"),
        (config.hidden_act != "silu", f"the activation {config.hidden_act!r}"),
    ):
        if is_odd:
            raise ValueError(f"a GGUF file of a {config.model_type} model cannot store {what}; use padded")
    return architecture


def _takes(architecture: str, geometry: Geometry, rope: str) -> bool:
    """Return whether an architecture of equal layers fits a model; llama.cpp's `qwen2` has one width of heads."""
    return geometry.is_uniform and (architecture != "qwen2" or (_fills_width(geometry) and rope == "default"))


def _needs_padding(architecture: str, geometry: Geometry, is_padded: bool) -> bool:
    """Return whether layers have to be padded to equal shapes."""
    return is_padded or not (geometry.is_uniform or architecture in UNEQUAL)


def _get_padding(
    architecture: str, kind: str, is_padded: bool, channel_multiple: int
) -> tuple[Callable[[Geometry], bool], int]:
    """Return a check whether the reader accepts equal shapes, and the number that widths are multiples of."""
    accepts = (_divides_width if architecture == "llama" else _fills_width) if is_padded else lambda _: True
    return accepts, math.lcm(channel_multiple, _get_block_size(TYPES[kind][0]))


def _divides_width(geometry: Geometry) -> bool:
    return geometry.hidden_size % geometry.query_heads[0] == 0


def _fills_width(geometry: Geometry) -> bool:
    return geometry.query_heads[0] * geometry.head_dim == geometry.hidden_size


def _get_block_size(kind: gguf.GGMLQuantizationType) -> int:
    """Return the number of values that share a scale."""
    return gguf.GGML_QUANT_SIZES[kind][0]


def _write_config(
    writer: gguf.GGUFWriter, architecture: str, config: PretrainedConfig, geometry: Geometry, name: str
) -> None:
    writer.add_name(f"{name or 'a model'}, pruned")  # transformers treats a bare "mistral" as a special name
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    for add, counts in (
        (writer.add_feed_forward_length, geometry.channels),
        (writer.add_head_count, geometry.query_heads),
        (writer.add_head_count_kv, geometry.kv_heads),
    ):
        add(list(counts) if architecture in UNEQUAL else counts[0])
    writer.add_key_length(geometry.head_dim)
    writer.add_value_length(geometry.head_dim)
    writer.add_rope_dimension_count(geometry.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_string(CONFIG_KEY, describe_config(config))


def _list_entries(
    architecture: str, config: PretrainedConfig, weights: Mapping[str, Tensor], kind: gguf.GGMLQuantizationType
) -> Iterator[_Entry]:
    """Yield the tensors under their names in the file.

    Raises:
        ValueError: if a weight is not finite in float16.
    """
    for source, tensor in weights.items():
        if not tensor.to(torch.float16).isfinite().all():
            raise ValueError(f"{source} has values that are too large for float16 in a GGUF file; use padded")
    geometry, vector = read_geometry(config), gguf.GGMLQuantizationType.F32
    if config.rope_parameters.get("rope_type") == "llama3":
        yield _Entry(ROPE_FACTORS, _compute_rope_factors(config.rope_parameters, geometry.head_dim), vector)
    for name, tensor in pack_tensors(weights, geometry, architecture):
        fits = tensor.shape[-1] % _get_block_size(kind) == 0
        matrix = kind if fits else gguf.GGMLQuantizationType.F16
        yield _Entry(name, tensor, matrix if tensor.ndim > 1 else vector)


def _compute_rope_factors(rope: Mapping[str, Any], head_dim: int) -> Tensor:
    """Compute Llama 3.1's divisors of rotary frequencies, `[head_dim / 2]`: 1 for short waves, `factor` for long."""
    wave = 2 * math.pi * rope["rope_theta"] ** (torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    low, high, context = rope["low_freq_factor"], rope["high_freq_factor"], rope["original_max_position_embeddings"]
    smooth = ((context / wave - low) / (high - low)).clamp(0, 1)
    factors: Tensor = 1 / ((1 - smooth) / rope["factor"] + smooth)
    return factors.float()


def _store(tensor: Tensor, entry: _Entry) -> np.ndarray[Any, Any]:
    return gguf.quants.quantize(tensor.detach().float().cpu().contiguous().numpy(), entry.kind)


def _check_written(file: Path, config: PretrainedConfig, weights: Mapping[str, Tensor]) -> None:
    """Check config and weights in a file, tensor by tensor.

    Raises:
        ValueError: with the part that is wrong.
    """
    header = read_header(file)
    written = read_config(header)
    if difference := read_geometry(written).difference(read_geometry(config)):
        raise ValueError(f"{file.name} differs from the model ({difference}): export it again")
    missing = set(weights)
    for name, tensor in read_weights(header, written, torch.float32):
        expected = weights[name].detach().float().cpu()
        if tensor.shape != expected.shape or (tensor - expected).abs().max() > _ROUNDING * expected.abs().max():
            raise ValueError(f"{name} in {file.name} differs from the model: export it again")
        missing.remove(name)
    if missing:
        raise ValueError(f"{file.name} lacks {min(missing)} ({len(missing)} in all): export it again")
