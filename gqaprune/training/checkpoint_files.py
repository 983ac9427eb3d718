"""Open checkpoints of training so that nothing in them runs code.

torch and Lightning unpickle some of their files: what is reached by a URL, what DeepSpeed writes, whole files under
FSDP, and of a folder of shards its `.metadata` and every value that is not a tensor. Here torch is held to weights and
plain data while a checkpoint is read, and what is unpickled all the same is looked through first.
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
"""Variables of the environment that make torch take all that it loads for weights alone, or nothing."""

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
"""What the metadata of a distributed checkpoint may name: classes that hold plain data."""


def check_is_local(path: str | os.PathLike[str]) -> None:
    """Refuse a checkpoint anywhere but on this machine: `https://`, `s3://`, `memory://`, fsspec's chains by `::`.

    Raises:
        ValueError: with what to do instead.
    """
    text = os.fspath(path)
    if "://" in text or "::" in text or text.startswith("registry:"):
        raise ValueError(
            f"a checkpoint is a file or a folder on this machine, got {text}: fetch it first, if you trust where it is"
        )


def read_checkpoint(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint holds; of a folder of shards, what it holds besides tensors.

    Raises:
        ValueError: if it is none, a folder where nothing but unpickling could tell, or it names what could run code.
    """
    if not checkpoint.exists():
        raise ValueError(f"no checkpoint at {checkpoint}")
    path = checkpoint / SHARDED if checkpoint.is_dir() else checkpoint
    if not path.is_file():
        raise ValueError(
            f"{checkpoint} has no {SHARDED}: gqaprune goes on from Lightning's files and from folders of FSDP and "
            "FSDP2, not from DeepSpeed's, which would have to be unpickled; begin anew with --ckpt_path null"
        )
    if checkpoint.is_dir():
        _check_shards(checkpoint)
    try:
        content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except UnpicklingError as error:
        reason = re.search("(?:WeightsUnpickler error: |Trying to load )(.*)", str(error))
        raise ValueError(
            f"{path} is cut short, or holds more than weights and plain data, which could run code "
            f"({reason[1] if reason else first_line(error)})"
        ) from None
    except (RuntimeError, EOFError) as error:
        raise ValueError(f"{path} is cut short, or no checkpoint of Lightning's ({first_line(error)})") from None
    return content if isinstance(content, dict) else {}


@contextmanager
def load_weights_alone() -> Iterator[None]:
    """Let `torch.load` build nothing but tensors and plain data, whatever its caller asks for."""
    before = {name: os.environ.pop(name, None) for name in (_FORCE, _FORCE_NOT)}
    os.environ[_FORCE] = "1"
    try:
        yield
    finally:
        del os.environ[_FORCE]
        os.environ.update({name: value for name, value in before.items() if value is not None})


def guard_loading(strategy: Any) -> None:
    """Make a trainer's strategy read no checkpoint, however it is named, that could run code. Twice does no more.

    Args:
        strategy: Lightning's, whose `load_checkpoint` reads for every command, from a path or as `best` or `last`.
    """
    load = strategy.load_checkpoint
    if hasattr(load, "__wrapped__"):
        return

    def load_guarded(checkpoint_path: str | Path, weights_only: bool | None = None) -> Any:
        check_is_local(checkpoint_path)
        path = Path(checkpoint_path)
        content, expected = read_checkpoint(path), ALWAYS if path.is_dir() else ALWAYS | {WEIGHTS}
        if missing := expected - content.keys():
            raise ValueError(f"{path} is no checkpoint of Lightning's: it has no {min(missing)}")
        weights = content.get(WEIGHTS, {})
        if not isinstance(weights, dict) or not all(isinstance(name, str) for name in weights):
            raise ValueError(f"{path} is no checkpoint of Lightning's: its {WEIGHTS} has no weights by name")
        from torch.distributed.checkpoint.api import CheckpointException  # takes two seconds to import

        with load_weights_alone():
            try:
                return load(checkpoint_path, weights_only=True)
            except CheckpointException as failure:  # which is no Exception
                error = next(iter(failure.failures.values()))[0]
                raise ValueError(f"{path}: its shards cannot be read ({first_line(error)})") from None

    load_guarded.__wrapped__ = load  # type: ignore[attr-defined]
    strategy.load_checkpoint = load_guarded


def guard_restoring(trainer: Any) -> None:
    """Say in one sentence where what a checkpoint holds, though plain data, does not fit. Twice does no more."""

    def wrap(restore: Callable[..., None]) -> Callable[..., None]:
        @wraps(restore)
        def restore_guarded(*arguments: Any, **options: Any) -> None:
            try:
                restore(*arguments, **options)
            except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError) as error:
                if isinstance(error, RuntimeError) and trainer.world_size > 1:  # the end of another rank
                    raise
                raise ValueError(
                    f"cannot resume from {trainer.ckpt_path}: its state of training does not fit this run "
                    f"({type(error).__name__}: {first_line(error)}); give another checkpoint, or --ckpt_path null"
                ) from error

        return restore if hasattr(restore, "__wrapped__") else restore_guarded

    wrap_restoring(trainer, wrap)


def _check_shards(folder: Path) -> None:
    """Refuse a folder of shards whose metadata names more than torch's own classes, or files outside of the folder."""
    for path in folder.glob("*.metadata"):
        try:
            with path.open("rb") as file:
                content = _MetadataUnpickler(file).load()
            files = [info.state["relative_path"] for info in content.state["storage_data"].values()]
            if strange := [name for name in files if PurePath(name).name != name]:
                raise UnpicklingError(f"it names {strange[0]}, which is not in its folder")
        except (OSError, MemoryError, RecursionError):
            raise ValueError(f"{path} is not what torch writes beside shards") from None
        except Exception as error:  # a pickle can fail in every way
            raise ValueError(f"{path} is not what torch writes beside shards: {first_line(error)}") from None


class _StandIn:
    """In the place of an admitted class, which a pickle could change: takes all arguments, and keeps its state."""

    state: Any = None

    def __new__(cls, *_: Any) -> "_StandIn":
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _MetadataUnpickler(pickle.Unpickler):
    """Builds stand-ins, of what is admitted alone."""

    def find_class(self, module: str, name: str) -> Any:
        """The stand-in for a name."""
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if f"{module}.{name}" not in _ADMITTED:
            raise UnpicklingError(f"it names {module}.{name}, which could run code")
        return _StandIn
