"""GGUF headers: what is broken, cut off or forged is said in a sentence, and costs neither memory nor time."""

import struct
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from gqaprune.models.gguf_file import read_header, read_tensor
from gqaprune.models.loading import load_config, load_model
from gqaprune.models.tokenizer import load_tokenizer

VALUES = np.random.default_rng(0).normal(size=(4, 256)).astype(np.float32)


def write_file(path: Path, kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(0)
    writer.add_uint32("general.alignment", 32)
    writer.add_array("numbers", [1, 2, 3])
    writer.add_array("words", ["b", "é"])
    writer.add_float32("pi", 3.5)
    writer.add_tensor("a", gguf.quants.quantize(VALUES, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_metadata_and_tensors_are_read(tmp_path: Path) -> None:
    header = read_header(write_file(tmp_path / "model.gguf"))
    sizes = {"llama.block_count": 0, "general.alignment": 32}
    expected = {"general.architecture": "llama", "numbers": [1, 2, 3], "words": ["b", "é"], "pi": 3.5}
    assert header.metadata == expected | sizes
    assert torch.equal(read_tensor(header, "a"), torch.from_numpy(VALUES))


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q4_0", "Q5_0", "Q5_1", "Q8_0"])
def test_tensors_are_expanded_however_they_are_stored(kind: str, tmp_path: Path) -> None:
    header = read_header(write_file(tmp_path / "model.gguf", gguf.GGMLQuantizationType[kind]))
    tensor = read_tensor(header, "a")
    assert tensor.dtype == torch.float32 and 0 < (tensor - torch.from_numpy(VALUES)).abs().max() < 0.5


@pytest.mark.parametrize("kind", ["Q4_K", "Q5_K", "Q6_K"])
def test_tensors_that_llama_cpp_quantised_are_expanded(kind: str, tmp_path: Path) -> None:
    stored = gguf.GGMLQuantizationType[kind]
    blocks = np.full((4, gguf.GGML_QUANT_SIZES[stored][1]), 60, np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_tensor("a", blocks, raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    tensor = read_tensor(read_header(tmp_path / "model.gguf"), "a")
    assert tensor.shape == (4, 256) and tensor.abs().max() > 0


def replace_counts(tensors: int, values: int) -> Callable[[bytes], bytes]:
    return lambda data: data[:8] + struct.pack("<QQ", tensors, values) + data[24:]


def replace_number(before: bytes, skipped: int, number: int) -> Callable[[bytes], bytes]:
    """Put a number of 64 bits so many bytes after the text that is before it."""

    def change(data: bytes) -> bytes:
        place = data.index(before) + len(before) + skipped
        return data[:place] + struct.pack("<Q", number) + data[place + 8 :]

    return change


HUGE = 2**62
FORGED: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "nothing": (lambda _: b"", "is not a GGUF file: it does not begin with GGUF"),
    "other": (lambda data: b"PK" + data, "is not a GGUF file: it does not begin with GGUF"),
    "version": (lambda data: data[:4] + b"\1" + data[5:], "has version 1 of the GGUF format"),
    "header": (lambda data: data[:60], "header of model.gguf is broken or truncated"),
    "tensors": (lambda data: data[:-40], "is truncated within its tensors"),
    "count of tensors": (replace_counts(HUGE, 6), "header of model.gguf is broken or truncated"),
    "count of values": (replace_counts(1, HUGE), "header of model.gguf is broken or truncated"),
    "length of an array": (replace_number(b"numbers", 8, HUGE), "header of model.gguf is broken or truncated"),
    "length of an array of words": (replace_number(b"words", 8, HUGE), "header of model.gguf is broken or truncated"),
    "length of a word": (replace_number(b"words", 16, HUGE), "header of model.gguf is broken or truncated"),
    "type": (replace_number(b"pi", 0, 77), "a value of the unknown type 77"),
    "rows": (replace_number(b"a\2\0\0\0", 8, HUGE), "is truncated within its tensors"),
    "offset": (replace_number(b"a\2\0\0\0", 20, HUGE), "is truncated within its tensors"),
    "alignment of 0": (
        replace_number(b"general.alignment", 0, 4),
        "alignment of model.gguf must be a power of two",
    ),
    "odd alignment": (replace_number(b"general.alignment", 0, 4 + (33 << 32)), "must be a power of two, got '33'"),
    "a setting twice": (
        lambda data: data.replace(b"general.alignment", b"llama.block_count"),
        "setting 'llama.block_count' occurs twice",
    ),
    "more layers": (replace_number(b"block_count", 0, 4 + (1 << 63)), "says 2147483648 layers, but it has 0"),
    "no number of layers": (lambda data: data.replace(b"block_count", b"block_cOunt"), "says None layers, but it ha"),
    "text": (lambda data: data.replace("é".encode(), b"\xff\xff"), "header of model.gguf is broken or truncated"),
}


@pytest.mark.parametrize("what", list(FORGED))
def test_broken_and_forged_files_are_said_in_a_sentence(what: str, tmp_path: Path) -> None:
    change, sentence = FORGED[what]
    path = write_file(tmp_path / "model.gguf")
    path.write_bytes(change(path.read_bytes()))
    for load in (load_config, load_model, load_tokenizer):
        with pytest.raises(ValueError, match=f"cannot load a .* from .*{sentence}") as caught:
            load(path)
        assert "\n" not in str(caught.value)


def test_tensors_that_lie_over_each_other_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for name in ("a-", "b-"):
        writer.add_tensor(name, VALUES)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    data = replace_number(b"b-\2\0\0\0", 20, 0)(path.read_bytes())
    path.write_bytes(data)
    read_header(path)  # as large as the file in all
    path.write_bytes(data[: -VALUES.nbytes])
    with pytest.raises(ValueError, match=r"tensors of model\.gguf overlap"):
        read_header(path)
