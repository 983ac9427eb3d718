"""Read and write files of tensors with a checksum, so that a flipped bit is noticed."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

_CHECKSUM = "checksum"


def pack_tensors(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """Pack tensors into the content of a safetensors file with a checksum.

    Args:
        tensors: tensors by name, on the CPU and contiguous.
        metadata: further entries of the file.
    """
    return save(dict(tensors), {**metadata, _CHECKSUM: _hash(tensors, metadata)})


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read tensors and metadata from a file with the content of `pack_tensors`.

    Raises:
        FileNotFoundError: if the file does not exist.
        ValueError: if it is damaged.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.offset_keys()}
    except (SafetensorError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged ({error})") from None
    if metadata.pop(_CHECKSUM, None) != _hash(tensors, metadata):
        raise ValueError(f"{path} is damaged: its checksum does not match")
    return tensors, metadata


def hash_text(text: str) -> str:
    """Compute the checksum of a text."""
    return hashlib.sha256(text.encode()).hexdigest()


def _hash(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    content = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        content.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        content.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return content.hexdigest()
