"""Compute a fingerprint of a model's weight files from samples, without reading a whole model."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from gqaprune.models.sources import find_weights

_SAMPLE = 2**12
_EVERY = 2**20


class _Span(NamedTuple):
    """A tensor in a file: name, type and shape in words, and its first and last byte."""

    label: str
    file: Path
    start: int
    end: int


def fingerprint_weights(source: str | Path, local_files_only: bool = False) -> str:
    """Hash names, types, shapes and values of a model's tensors; of those above 1 MiB, the first 4 KiB of every MiB.

    It does not depend on how a model is loaded or how its tensors are distributed over files. A GGUF file counts as
    one tensor.

    Args:
        source: model, as for `load_model`.
        local_files_only: download nothing from the hub.

    Raises:
        ValueError: if the model does not exist, or its files are broken.
    """
    content = hashlib.sha256()
    for span in sorted(span for file in find_weights(source, local_files_only) for span in _find_spans(file)):
        content.update(span.label.encode())
        with span.file.open("rb") as file:
            step = _EVERY if span.end - span.start > _EVERY else _SAMPLE
            for start in range(span.start, span.end, step):
                file.seek(start)
                content.update(file.read(min(_SAMPLE, span.end - start)))
    return content.hexdigest()[:32]


def find_fingerprint(source: str) -> str:
    """Return the fingerprint of a model on this machine; empty if it has no files here."""
    try:
        return fingerprint_weights(source, local_files_only=True) if source else ""
    except ValueError:
        return ""


def _find_spans(path: Path) -> Iterator[_Span]:
    if path.suffix == ".gguf":
        yield _Span(path.suffix, path, 0, path.stat().st_size)
        return
    with path.open("rb") as file:  # 8 bytes of size, a header in JSON, then the values
        size = int.from_bytes(file.read(8), "little")
        tensors = json.loads(file.read(size))
    for name, tensor in tensors.items():
        if name != "__metadata__":
            start, end = (8 + size + place for place in tensor["data_offsets"])
            yield _Span(f"{name} {tensor['dtype']} {tensor['shape']}", path, start, end)
