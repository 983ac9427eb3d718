"""Quantise a GGUF file to 4 to 6 bits with llama.cpp's quantiser, in llama.cpp's mixtures of types.

The quantiser is that of the wheel `xllamacpp`, which rounds matrices and leaves the choice of types to its caller, or
else the program `llama-quantize`. Both write the same bytes of weights.

Source of the mixtures: github.com/ggml-org/llama.cpp/blob/master/src/llama-quant.cpp, without its exception for
models of 80 layers.
"""

import ctypes
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from math import ceil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from gguf import ReaderTensor
from transformers import PretrainedConfig

from gqaprune.checkpoints.base import Content
from gqaprune.checkpoints.gguf_writer import choose_architecture, find_gguf_shapes, write_gguf_checkpoint
from gqaprune.common.console import track
from gqaprune.geometry import Geometry
from gqaprune.models.gguf_file import read_header, read_tensor

MIXTURES = {
    "q4_k_m": (Type.Q4_K, gguf.LlamaFileType.MOSTLY_Q4_K_M),
    "q5_k_m": (Type.Q5_K, gguf.LlamaFileType.MOSTLY_Q5_K_M),
    "q6_k": (Type.Q6_K, gguf.LlamaFileType.MOSTLY_Q6_K),
}
"""Name -> type of most matrices, and the file type in the header; the matrices that matter most are `Q6_K`."""

_FALLBACKS = {Type.Q4_K: Type.Q5_0, Type.Q5_K: Type.Q5_1, Type.Q6_K: Type.Q8_0}
"""Types of matrices whose rows are not whole blocks of 256."""
_WIDTH = 32
"""Widths of MLPs in the file are multiples of it, because it is the block of every fallback."""
_ROUNDING = 0.25
"""A bound above the relative change of a matrix in 4 bits, which is 0.07 for normally distributed values."""
_ARCHITECTURE, _FILE_TYPE = "general.architecture", "general.file_type"

Quantizer = Callable[[Path, Path, str], None]
"""Quantises one file into another, in the named mixture."""


def write_quantized_checkpoint(content: Content, folder: Path, kind: str) -> None:
    """Write a model into a folder, as one GGUF file in a mixture of types.

    Raises:
        ValueError: like `write_gguf_checkpoint` and `find_quantizer`, or if the quantiser fails.
    """
    quantize = find_quantizer()
    write_gguf_checkpoint(content, folder, "f16", channel_multiple=_WIDTH)
    source, target = folder / "model-f16.gguf", folder / f"model-{kind}.gguf"
    try:
        quantize(source, target, kind)
        _check_copy(source, target)
    finally:
        source.unlink()


def find_quantized_shapes(config: PretrainedConfig) -> Geometry:
    """Find the shapes in the file that `write_quantized_checkpoint` writes for a config.

    Raises:
        ValueError: like `find_gguf_shapes`.
    """
    return find_gguf_shapes(config, channel_multiple=_WIDTH)


def check_quantizable(config: PretrainedConfig) -> None:
    """Raise an error if the format cannot store the model, or no quantiser is installed.

    Raises:
        ValueError: like `choose_architecture` and `find_quantizer`.
    """
    choose_architecture(config)
    find_quantizer()


def find_quantizer() -> Quantizer:
    """Find the quantiser: the wheel `xllamacpp`, or else the program `llama-quantize`.

    Raises:
        ValueError: if neither is installed.
    """
    if (rounding := _load_rounding()) is not None:
        return partial(_quantize_by_wheel, rounding)
    if program := shutil.which("llama-quantize"):
        return partial(_quantize_by_program, program)
    raise ValueError(
        "4 to 6 bits need llama.cpp's quantiser, but neither xllamacpp nor llama-quantize is installed: "
        "pip install 'gqaprune[llama-cpp]', or use gguf-q8_0"
    )


def describe_fallbacks(folder: Path) -> str:
    """Describe which matrices of the file in a folder have larger types than requested, and why; empty if none."""
    header = read_header(next(folder.glob("*.gguf")))
    matrices = [tensor for tensor in header.tensors.values() if len(tensor.shape) > 1]
    counts = Counter(tensor.kind.name.lower() for tensor in matrices if tensor.kind not in _FALLBACKS)
    if not counts:
        return ""
    types = ", ".join(f"{count} in {name}" for name, count in counts.most_common())
    hidden = header.metadata[f"{header.metadata[_ARCHITECTURE]}.embedding_length"]
    if hidden % gguf.QK_K:
        reason = f"most of them have rows of {hidden} values, this model's hidden size"
    else:
        reason = f"set pruning.limits.channel_multiple to {gguf.QK_K} to avoid it in MLPs"
    return (
        f"{counts.total()} of {len(matrices)} matrices are stored in larger types ({types}), because their rows are "
        f"not multiples of {gguf.QK_K} values: {reason}."
    )


def _quantize_by_program(program: str, source: Path, target: Path, kind: str) -> None:
    done = subprocess.run([program, str(source), str(target), kind.upper()], capture_output=True, text=True)
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip()).splitlines()
        raise ValueError(f"{program} could not write {kind} ({said[-1] if said else 'no message'}); use gguf-q8_0")


def _load_rounding() -> Callable[..., int] | None:
    """Load the function of the wheel's library that rounds rows; None if it is missing or not exported here."""
    try:
        import xllamacpp  # type: ignore[import-untyped]

        rounding = ctypes.CDLL(xllamacpp.xllamacpp.__file__).ggml_quantize_chunk
    except (AttributeError, ImportError, OSError):
        return None
    number, pointer = ctypes.c_int64, ctypes.c_void_p
    rounding.argtypes = [ctypes.c_int, pointer, pointer, number, number, number, pointer]
    return rounding


def _quantize_by_wheel(rounding: Callable[..., int], source: Path, target: Path, kind: str) -> None:
    reader, header = gguf.GGUFReader(source), read_header(source)
    architecture, is_tied = header.metadata[_ARCHITECTURE], "output.weight" not in header.tensors
    layers = header.metadata[f"{architecture}.block_count"]
    types = {tensor.name: _choose_type(tensor, kind, layers, is_tied) for tensor in reader.tensors}
    writer = gguf.GGUFWriter(target, architecture)
    try:
        for name, field in reader.fields.items():
            if name.startswith("GGUF.") or name == _ARCHITECTURE:  # the writer sets these
                continue
            value = MIXTURES[kind][1] if name == _FILE_TYPE else field.contents()
            writer.add_key_value(name, value, field.types[0], field.types[-1])
        for tensor in reader.tensors:
            shape = [int(size) for size in reversed(tensor.shape)]
            shape[-1] = _measure_row(shape[-1], types[tensor.name])
            writer.add_tensor_info(tensor.name, shape, np.dtype(np.uint8), int(np.prod(shape)), types[tensor.name])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in track(reader.tensors, f"quantising to {kind}", "tensors"):
            new, is_same = types[tensor.name], types[tensor.name] == tensor.tensor_type
            writer.write_tensor_data(tensor.data if is_same else _round(rounding, tensor.data, new))
    finally:
        writer.close()


def _choose_type(tensor: ReaderTensor, kind: str, layers: int, is_tied: bool) -> Type:
    """Choose a tensor's type in a mixture: attention values, second matrices of MLPs and the head have more bits."""
    if len(tensor.shape) == 1:
        return tensor.tensor_type
    name, wanted = tensor.name, MIXTURES[kind][0]
    is_head = name == "output.weight" or (is_tied and name == "token_embd.weight")
    is_sensitive = any(part in name for part in (".attn_v.", ".attn_qkv.", ".ffn_down."))
    if is_head or (is_sensitive and _has_more_bits(int(name.split(".")[1]), layers)):
        wanted = Type.Q6_K
    candidates = (wanted, _FALLBACKS[wanted])
    return next((each for each in candidates if tensor.shape[0] % gguf.GGML_QUANT_SIZES[each][0] == 0), Type.F16)


def _has_more_bits(layer: int, layers: int) -> bool:
    """Return whether a layer is in the first or last eighth, or is every third layer between."""
    eighth = layers // 8
    return layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2


def _measure_row(values: int, kind: Type) -> int:
    """Return the bytes of a row."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    return values // block * size


def _round(rounding: Callable[..., int], matrix: np.ndarray[Any, Any], kind: Type) -> np.ndarray[Any, Any]:
    """Round a matrix, with its rows divided among threads."""
    values = np.ascontiguousarray(matrix, dtype=np.float32)
    rows, columns = values.shape
    quantized = np.empty((rows, _measure_row(columns, kind)), np.uint8)
    step = ceil(rows / torch.get_num_threads())

    def round_from(row: int) -> None:
        count = min(step, rows - row)
        rounding(kind, values.ctypes.data, quantized.ctypes.data, row * columns, count, columns, None)

    with ThreadPoolExecutor() as pool:
        list(pool.map(round_from, range(0, rows, step)))
    return quantized


def _check_copy(source: Path, target: Path) -> None:
    """Check that a quantised file has the model and the tokenizer of the file it was made from.

    Raises:
        ValueError: with the difference.
    """
    before, after = read_header(source), read_header(target)
    for name, value in before.metadata.items():
        if name != _FILE_TYPE and after.metadata.get(name) != value:
            raise ValueError(f"llama.cpp's quantiser changed {name} in the file; use gguf-q8_0")
    for name, stored in before.tensors.items():
        if name not in after.tensors or after.tensors[name].shape != stored.shape:
            raise ValueError(f"llama.cpp's quantiser changed the shape of {name}; use gguf-q8_0")
        expected = read_tensor(before, name)
        if not (read_tensor(after, name) - expected).norm() <= _ROUNDING * expected.norm():
            raise ValueError(f"llama.cpp's quantiser changed {name} by more than rounding; use gguf-q8_0")
