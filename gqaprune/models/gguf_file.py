"""Read a GGUF file's header and tensors, never beyond the file's end.

Source: the format, github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

import mmap
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

_VERSIONS = (2, 3)
_MOST_DIMENSIONS = 4
_ALIGNMENTS = tuple(2**power for power in range(21))
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""The format's types of numbers -> their codes in `struct`."""
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True)
class GgufTensor:
    """Place of a tensor in its file.

    Args:
        shape: shape of the tensor in memory.
        kind: type in which its values are stored.
        start: position of its first byte in the file.
    """

    shape: tuple[int, ...]
    kind: gguf.GGMLQuantizationType
    start: int

    @property
    def bytes_shape(self) -> tuple[int, ...]:
        """Its shape in bytes; rows are whole blocks of values."""
        return gguf.quant_shape_to_byte_shape(self.shape, self.kind)


@dataclass(frozen=True)
class GgufHeader:
    """Header of a GGUF file.

    Args:
        path: path of the file.
        metadata: key -> number, string or list of them.
        tensors: name -> place of the tensor.
    """

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]

    @property
    def most_weights(self) -> int:
        """Number of weights in all tensors together."""
        return sum(prod(tensor.shape) for tensor in self.tensors.values())


def read_header(path: Path) -> GgufHeader:
    """Read a file's header, and check that all tensors are within the file.

    Raises:
        ValueError: if the file is broken, truncated or forged.
        OSError: if it cannot be read.
    """
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ValueError(f"{path.name} is not a GGUF file: it does not begin with GGUF")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                return _parse(path, _Cursor(data))
            except (struct.error, MemoryError, OverflowError, UnicodeDecodeError):
                raise ValueError(f"the header of {path.name} is broken or truncated: fetch or write it again") from None


def read_tensor(header: GgufHeader, name: str) -> Tensor:
    """Read one tensor as float32, whatever type it is stored in.

    Raises:
        NotImplementedError: if its type cannot be read.
    """
    stored = header.tensors[name]
    shape = stored.bytes_shape
    data = np.memmap(header.path, np.uint8, "r", offset=stored.start, shape=(prod(shape),)).reshape(shape)
    return torch.from_numpy(np.array(gguf.quants.dequantize(data, stored.kind), dtype=np.float32))


class _Cursor:
    """Reads values one after another; `struct` raises an error beyond the end."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at, self.end = data, 4, len(data)

    def read(self, types: str) -> tuple[Any, ...]:
        values = struct.unpack_from(f"<{types}", self.data, self.at)
        self.at += struct.calcsize(f"<{types}")
        return values

    def read_string(self) -> str:
        (length,) = self.read("Q")
        (text,) = self.read(f"{length}s")
        return bytes(text).decode("utf-8")

    def read_value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.read_string()
        if kind != _ARRAY:
            return self.read(_name_scalar(kind))[0]
        kind, count = self.read("IQ")
        if kind == _STRING:
            return [self.read_string() for _ in range(count)]
        return list(self.read(f"{count}{_name_scalar(kind)}"))

    def read_entries(self, count: int, what: str) -> Iterator[str]:
        """Yield names of entries, which must be unique; the caller reads an entry before asking for the next name."""
        names = set()
        for _ in range(count):
            name = self.read_string()
            if name in names:
                raise ValueError(f"{what} {name[:80]!r} occurs twice: fetch or write the file again")
            names.add(name)
            yield name


def _name_scalar(kind: int) -> str:
    if kind not in _SCALARS:
        raise ValueError(f"its metadata has a value of the unknown type {kind}: fetch or write the file again")
    return _SCALARS[kind]


def _parse(path: Path, cursor: _Cursor) -> GgufHeader:
    version, tensor_count, value_count = cursor.read("IQQ")
    if version not in _VERSIONS:
        raise ValueError(
            f"{path.name} has version {version} of the GGUF format, but only {_VERSIONS} can be read: write it again "
            "with a current version of llama.cpp"
        )
    metadata = {key: cursor.read_value(*cursor.read("I")) for key in cursor.read_entries(value_count, "setting")}
    places: dict[str, tuple[tuple[int, ...], int, int]] = {}
    for name in cursor.read_entries(tensor_count, "tensor"):
        (dimensions,) = cursor.read("I")
        if not 1 <= dimensions <= _MOST_DIMENSIONS:
            raise ValueError(f"{name[:80]!r} has {dimensions} dimensions: fetch or write {path.name} again")
        shape = cursor.read(f"{dimensions}Q")[::-1]
        places[name] = (shape, *cursor.read("IQ"))
    alignment = metadata.get("general.alignment", gguf.GGUF_DEFAULT_ALIGNMENT)
    if alignment not in _ALIGNMENTS:
        raise ValueError(f"general.alignment of {path.name} must be a power of two, got {str(alignment)[:40]!r}")
    begin = -(-cursor.at // alignment) * alignment
    tensors = {
        name: GgufTensor(shape, gguf.GGMLQuantizationType(kind), begin + offset)
        for name, (shape, kind, offset) in places.items()
    }
    sizes = {name: prod(stored.bytes_shape) for name, stored in tensors.items()}
    if any(stored.start + sizes[name] > cursor.end for name, stored in tensors.items()):
        raise ValueError(f"{path.name} is truncated within its tensors: fetch or write it again")
    if sum(sizes.values()) > cursor.end:
        raise ValueError(f"tensors of {path.name} overlap: fetch or write it again")
    return GgufHeader(path, metadata, tensors)
