"""Open training checkpoints without running code that they may contain.

torch and Lightning unpickle some files: those reached by a URL, those of DeepSpeed, whole files under FSDP, and in a
folder of shards its `.metadata` and every value that is not a tensor. Here torch may load only weights and plain data
while a checkpoint is read, and files that it unpickles anyway are inspected first.
"""

import os
import pickle
import re
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path, PurePath
from pickle import UnpicklingError
from typing import Any

import torch

from gqaprune.common.errors import first_line
from gqaprune.training.lightning_internals import ALWAYS, SHARDED, WEIGHTS, wrap_restoring

_FORCE, _FORCE_NOT = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
"""Environment variables that make `torch.load` always, or never, load only weights and plain data."""

_METADATA = "torch.distributed.checkpoint.metadata"
_STORAGE = "torch.distributed.checkpoint.filesystem"
_ADMITTED = {
    *(f"{_METADATA}.{name}StorageMetadata" for name in ("Bytes", "Chunk", "Tensor")),
    *(f"{_METADATA}.{name}" for name in ("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties")),
    f"{_METADATA}._MEM_FORMAT_ENCODING",
    *(f"{_STORAGE}.{name}" for name in ("_StorageInfo", "_StoragePrefix")),
    *(f"torch.{name}" for name, value in vars(torch).items() if isinstance(value, torch.dtype)),
    *(f"pathlib.{name}" for name in ("PosixPath", "PurePosixPath", "PureWindowsPath", "WindowsPath")),
    "torch.Size",
    "torch.serialization._get_layout",
}
"""Classes of plain data that the metadata of a distributed checkpoint may name."""


def check_is_local(path: str | os.PathLike[str]) -> None:
    """Raise an error for a checkpoint that is not a local path: `https://`, `s3://`, `memory://`, fsspec's `::`.

    Raises:
        ValueError: with the way out.
    """
    text = os.fspath(path)
    if "://" in text or "::" in text or text.startswith("registry:"):
        raise ValueError(
            f"a checkpoint must be a file or a folder on this machine, got {text}: download it first, if you trust its "
            "source"
        )


def read_checkpoint(checkpoint: Path) -> dict[str, Any]:
    """Read a checkpoint's content; of a folder of shards, everything but tensors.

    Raises:
        ValueError: if it is not a checkpoint, could only be read by unpickling, or names objects that could run code.
    """
    if not checkpoint.exists():
        raise ValueError(f"no checkpoint at {checkpoint}")
    path = checkpoint / SHARDED if checkpoint.is_dir() else checkpoint
    if not path.is_file():
        raise ValueError(
            f"{checkpoint} has no {SHARDED}: gqaprune resumes from Lightning's files and from folders of FSDP and "
            "FSDP2, but not from DeepSpeed's, which would have to be unpickled; use --ckpt_path null to train from the "
            "start"
        )
    if checkpoint.is_dir():
        _check_shards(checkpoint)
    try:
        content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except UnpicklingError as error:
        reason = re.search("(?:WeightsUnpickler error: |Trying to load )(.*)", str(error))
        raise ValueError(
            f"{path} is truncated, or has objects other than weights and plain data, which could run code "
            f"({reason[1] if reason else first_line(error)})"
        ) from None
    except (RuntimeError, EOFError) as error:
        raise ValueError(f"{path} is truncated, or not a Lightning checkpoint ({first_line(error)})") from None
    return content if isinstance(content, dict) else {}


@contextmanager
def load_weights_alone() -> Iterator[None]:
    """Restrict `torch.load` to tensors and plain data, whatever its caller asks for."""
    before = {name: os.environ.pop(name, None) for name in (_FORCE, _FORCE_NOT)}
    os.environ[_FORCE] = "1"
    try:
        yield
    finally:
        del os.environ[_FORCE]
        os.environ.update({name: value for name, value in before.items() if value is not None})


def guard_loading(strategy: Any) -> None:
    """Make a trainer's strategy refuse checkpoints that could run code. A second call does nothing.

    Args:
        strategy: Lightning's strategy, whose `load_checkpoint` reads checkpoints for every command, whether they are
            named by a path, `best` or `last`.
    """
    load = strategy.load_checkpoint
    if hasattr(load, "__wrapped__"):
        return

    def load_guarded(checkpoint_path: str | Path, weights_only: bool | None = None) -> Any:
        check_is_local(checkpoint_path)
        path = Path(checkpoint_path)
        content, expected = read_checkpoint(path), ALWAYS if path.is_dir() else ALWAYS | {WEIGHTS}
        if missing := expected - content.keys():
            raise ValueError(f"{path} is not a Lightning checkpoint: it has no {min(missing)}")
        weights = content.get(WEIGHTS, {})
        if not isinstance(weights, dict) or not all(isinstance(name, str) for name in weights):
            raise ValueError(f"{path} is not a Lightning checkpoint: its {WEIGHTS} has no weights by name")
        from torch.distributed.checkpoint.api import CheckpointException  # takes two seconds to import

        with load_weights_alone():
            try:
                return load(checkpoint_path, weights_only=True)
            except CheckpointException as failure:  # a BaseException, not an Exception
                error = next(iter(failure.failures.values()))[0]
                raise ValueError(f"{path}: its shards cannot be read ({first_line(error)})") from None

    load_guarded.__wrapped__ = load  # type: ignore[attr-defined]
    strategy.load_checkpoint = load_guarded


def guard_restoring(trainer: Any) -> None:
    """Turn errors of restoring a checkpoint that does not fit into one sentence. A second call does nothing."""

    def wrap(restore: Callable[..., None]) -> Callable[..., None]:
        @wraps(restore)
        def restore_guarded(*arguments: Any, **options: Any) -> None:
            try:
                restore(*arguments, **options)
            except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError) as error:
                if isinstance(error, RuntimeError) and trainer.world_size > 1:  # another rank may have ended
                    raise
                raise ValueError(
                    f"cannot resume from {trainer.ckpt_path}: its training state does not fit this run "
                    f"({type(error).__name__}: {first_line(error)}); use another checkpoint, or --ckpt_path null to "
                    "train from the start"
                ) from error

        return restore if hasattr(restore, "__wrapped__") else restore_guarded

    wrap_restoring(trainer, wrap)


def _check_shards(folder: Path) -> None:
    """Raise an error if the metadata of a folder of shards names other classes than torch's, or files elsewhere."""
    for path in folder.glob("*.metadata"):
        try:
            with path.open("rb") as file:
                content = _MetadataUnpickler(file).load()
            files = [info.state["relative_path"] for info in content.state["storage_data"].values()]
            if strange := [name for name in files if PurePath(name).name != name]:
                raise UnpicklingError(f"it names {strange[0]}, which is not in its folder")
        except (OSError, MemoryError, RecursionError):
            raise ValueError(f"{path} is not metadata that torch writes beside shards") from None
        except Exception as error:  # a pickle can fail in every way
            raise ValueError(f"{path} is not metadata that torch writes beside shards: {first_line(error)}") from None


class _StandIn:
    """A substitute for an admitted class, which a pickle could change: accepts any arguments and keeps its state."""

    state: Any = None

    def __new__(cls, *_: Any) -> "_StandIn":
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _MetadataUnpickler(pickle.Unpickler):
    """Builds substitutes for admitted classes, and refuses all others."""

    def find_class(self, module: str, name: str) -> Any:
        """Return the substitute for a name."""
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if f"{module}.{name}" not in _ADMITTED:
            raise UnpicklingError(f"it names {module}.{name}, which could run code")
        return _StandIn
