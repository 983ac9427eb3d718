"""Files of tensors that know their own checksum, so that one flipped bit is not another result."""

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
    """The content of a safetensors file with a checksum.

    Args:
        tensors: by name, on the CPU and contiguous.
        metadata: what else the file holds.
    """
    return save(dict(tensors), {**metadata, _CHECKSUM: _hash(tensors, metadata)})


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a file that holds what `pack_tensors` gave.

    Raises:
        FileNotFoundError: if it is not there.
        ValueError: if it is broken, or not as it was written.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.offset_keys()}
    except (SafetensorError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged ({error})") from None
    if metadata.pop(_CHECKSUM, None) != _hash(tensors, metadata):
        raise ValueError(f"{path} is damaged: it is not what its checksum was made from")
    return tensors, metadata


def hash_text(text: str) -> str:
    """The checksum of a text."""
    return hashlib.sha256(text.encode()).hexdigest()


def _hash(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    content = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        content.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        content.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return content.hexdigest()
