"""The last of a run's checkpoints whose weights are finite."""

from collections.abc import Iterable
from pathlib import Path
from pickle import UnpicklingError

import torch


def find_finite_checkpoint(folders: Iterable[str | Path]) -> Path | None:
    """The newest of the checkpoint files in folders whose weights are all finite."""
    paths = [path for folder in set(folders) for path in Path(folder).glob("*.ckpt") if path.is_file()]
    newest_first = sorted(paths, key=lambda path: path.stat().st_mtime_ns, reverse=True)
    return next((path for path in newest_first if _is_finite(path)), None)


def _is_finite(path: Path) -> bool:
    try:
        weights = torch.load(path, map_location="cpu", mmap=True, weights_only=True)["state_dict"]
    except (OSError, RuntimeError, KeyError, UnpicklingError):
        return False  # cut short
    return all(bool(torch.isfinite(tensor).all()) for tensor in weights.values())
