"""Find runs that did not end by their notes, and the last of their checkpoints with finite weights."""

import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from gqaprune.common.atomic_files import remove_lock, write_atomically
from gqaprune.common.checked_tensors import hash_text
from gqaprune.common.console import console
from gqaprune.common.json_files import read_json
from gqaprune.common.stage_cache import describe_change
from gqaprune.training.checkpoint_files import read_checkpoint
from gqaprune.training.lightning_internals import HYPER_PARAMETERS, TRAINING_STATE, WEIGHTS

UNFINISHED = Path("lightning_logs") / "unfinished"
"""Folder under a run's root folder with its note and its stages, until the run ends."""
_NOTE = "run.json"
_LOCK = "run.lock"
_CHECKSUM = "checksum"
_PATIENCE = 1.0
"""Seconds to wait for a run's lock, which other processes take for a moment to see whether it is free."""


@dataclass(frozen=True)
class RunNote:
    """Settings and folders of a run that has not ended.

    Args:
        settings: all settings, as plain data.
        folder: folder that the run writes its logs to.
        checkpoints: folders that it writes checkpoints to.
        run: id of the run in its checkpoints, because other runs may write to the same folders.
    """

    settings: Mapping[str, Any]
    folder: str
    checkpoints: tuple[str, ...]
    run: str

    def save(self, root: Path) -> None:
        """Write the note under a root folder."""
        path = root / UNFINISHED / _NOTE
        path.parent.mkdir(parents=True, exist_ok=True)
        data = asdict(self)
        write_atomically(path, (json.dumps({**data, _CHECKSUM: _hash(data)}, indent=1) + "\n").encode())

    @staticmethod
    def load(root: Path) -> "RunNote | None":
        """Read the note under a root folder, if there is one.

        Raises:
            ValueError: if it was damaged or changed.
        """
        path = root / UNFINISHED / _NOTE
        if not path.exists():
            return None
        try:
            data = read_json(path, "note of a run")
            if data.pop(_CHECKSUM) != _hash(data):
                raise ValueError("its checksum does not match")
            return RunNote(**data | {"checkpoints": tuple(data["checkpoints"])})
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is damaged ({error}): remove it to train from the start") from None

    def check_places(self, root: Path, settings: Mapping[str, Any]) -> None:
        """Raise an error if a folder of the note is neither under the run's root folder nor named by the settings.

        Args:
            root: the run's root folder.
            settings: settings of the command that resumes the run, as plain data.

        Raises:
            ValueError: with the first such folder.
        """
        named = _list_texts([value for name, value in settings.items() if name.startswith("trainer.")])
        homes = [root.resolve(), *(Path(text).resolve() for text in named if text)]
        for folder in (self.folder, *self.checkpoints):
            if not any(Path(folder).resolve().is_relative_to(home) for home in homes):
                raise ValueError(
                    f"{root / UNFINISHED / _NOTE} names {folder}, outside of the run's folder {root}: set --ckpt_path "
                    "to a checkpoint, or remove the file to train from the start"
                )

    @staticmethod
    def remove(root: Path, lock: FileLock) -> None:
        """Remove the note of a run that has ended, and the lock on it."""
        folder = root / UNFINISHED
        (folder / _NOTE).unlink(missing_ok=True)
        remove_lock(lock)
        with suppress(OSError):  # stages may still be there
            folder.rmdir()


def lock_note(root: Path) -> FileLock | None:
    """Lock the note under a root folder for a run; return None if another run that is not over has locked it.

    The system releases the lock when the run's process ends, however it ends.
    """
    lock = FileLock(root / UNFINISHED / _LOCK, timeout=_PATIENCE)
    try:
        lock.acquire()
    except Timeout:
        return None
    return lock


def _is_locked(root: Path) -> bool:
    lock = lock_note(root)
    if lock is not None:
        remove_lock(lock)
    return lock is None


@dataclass(frozen=True)
class FoundRun:
    """The place from which a run resumes.

    Args:
        folder: folder that the run writes its logs to; None means a new one.
        checkpoint: checkpoint that training resumes from; None trains from the start.
        searched: folders that were searched for checkpoints.
        run: id of the run in its checkpoints; empty for a new run.
    """

    folder: Path | None = None
    checkpoint: str | None = None
    searched: tuple[str, ...] = ()
    run: str = ""

    def to_json(self) -> str:
        """Encode it as text for other ranks."""
        return json.dumps(asdict(self), default=str)

    @staticmethod
    def from_json(text: str) -> "FoundRun":
        """Decode the text of `to_json`."""
        data = json.loads(text)
        folder = None if data["folder"] is None else Path(data["folder"])
        return FoundRun(**data | {"folder": folder, "searched": tuple(data["searched"])})


def find_run(root: Path, settings: Mapping[str, Any], asked: str | None, is_first: bool) -> FoundRun:
    """Find the place from which a run resumes: the checkpoint that is asked for, or that of a stopped run.

    Args:
        root: the run's root folder.
        settings: settings of this run, as plain data.
        asked: a checkpoint; `last` means the last one of a stopped run, with any settings; None means the last one of a
            stopped run with the same settings.
        is_first: whether this is rank 0; only rank 0 checks that no other run holds the lock, and prints the result.

    Raises:
        ValueError: if the note of a stopped run is damaged, or names folders of other runs.
    """
    note = RunNote.load(root) if asked in (None, "last") else None
    if note is None or (is_first and _is_locked(root)):
        return FoundRun(checkpoint=asked)
    note.check_places(root, settings)
    change = describe_change(note.settings, settings)
    if change and asked is None:
        found, sentence = FoundRun(), f"a run that did not end had other settings: {change}; training starts again"
    else:
        path = find_checkpoint(note.checkpoints, note.run)
        folder, checkpoint = (None if change else Path(note.folder)), (str(path) if path else None)
        found = FoundRun(folder, checkpoint, note.checkpoints, note.run)
        place = f"from {path}" if path else "which has no checkpoint yet"
        sentence = f"resuming the run in {note.folder}, {place}"
        sentence += f"; its settings were different: {change}" if change else ""
    if is_first:
        console.print(sentence)
    return found


def read_plan(checkpoint: Path) -> dict[str, Any] | None:
    """Read the plan, in plain types, from a checkpoint, a file or a folder of shards; None if it has none.

    Raises:
        ValueError: if the checkpoint cannot be read.
    """
    settings = read_checkpoint(checkpoint).get(HYPER_PARAMETERS, {})
    plan = settings.get("plan") if isinstance(settings, dict) else settings
    if plan is not None and not isinstance(plan, dict):
        raise ValueError(f"{checkpoint} is not a checkpoint of gqaprune: its plan is of type {type(plan).__name__}")
    return plan


def find_pruning_plan(checkpoint: str | Path | None, state_key: str) -> dict[str, Any] | None:
    """Read the plan, in plain types, that a pruning callback saved in a checkpoint of another class's module.

    Args:
        checkpoint: a file or a folder of shards; None has no plan.
        state_key: key of the callback's state.

    Raises:
        ValueError: if the checkpoint cannot be read.
    """
    if checkpoint is None or not Path(checkpoint).exists():
        return None
    states = read_checkpoint(Path(checkpoint)).get(TRAINING_STATE, {})
    plan: dict[str, Any] | None = states.get(state_key, {}).get("plan") if isinstance(states, dict) else None
    return plan


def read_strategy(checkpoint: Path) -> str:
    """Read which strategy wrote a sharded checkpoint, a folder; no other strategy can read it."""
    return str(read_checkpoint(checkpoint).get("strategy", "ModelParallelStrategy"))


def is_whole(checkpoint: Path) -> bool:
    """Return whether a checkpoint, a file or a folder of shards, has a training state besides weights.

    Raises:
        ValueError: if the checkpoint cannot be read.
    """
    return TRAINING_STATE in read_checkpoint(checkpoint)


def list_run_folders(root: Path) -> list[Path]:
    """List the folders that runs with a root folder write to: the root, their logs and their stages."""
    logs = root / UNFINISHED.parent
    return [root, logs, *(folder for folder in logs.glob("*") if folder.is_dir())]


def list_checkpoint_folders(writers: Iterable[object]) -> list[str]:
    """List the folders that a trainer's checkpoint callbacks write to, once the trainer has set them up."""
    folders = (getattr(writer, "dirpath", None) for writer in writers)
    return [str(folder) for folder in folders if folder]


def find_checkpoint(folders: Iterable[str | Path], run: str) -> Path | None:
    """Find the newest checkpoint in folders that a run can resume from.

    It belongs to the run and has the optimizer's state; if it is one file, all its weights are finite.
    """
    found = ((Path(folder).resolve(), path) for folder in set(folders) for path in Path(folder).glob("*.ckpt"))
    paths = [path for home, path in found if path.resolve().is_relative_to(home)]  # no link to elsewhere
    newest_first = sorted(paths, key=lambda path: path.stat().st_mtime_ns, reverse=True)
    return next((path for path in newest_first if _can_go_on(path, run)), None)


def _hash(data: Mapping[str, Any]) -> str:
    return hash_text(json.dumps(data, sort_keys=True))


def _list_texts(value: Any) -> list[str]:
    """List all strings in plain data."""
    if isinstance(value, (list, tuple)):
        return [text for one in value for text in _list_texts(one)]
    if isinstance(value, dict):
        return _list_texts(list(value.values()))
    return [value] if isinstance(value, str) else []


def _can_go_on(path: Path, run: str) -> bool:
    try:
        content = read_checkpoint(path)
    except (OSError, ValueError):
        return False
    weights = {} if path.is_dir() else content.get(WEIGHTS, {})
    is_own = content.get("run") == run and TRAINING_STATE in content
    return is_own and all(bool(torch.isfinite(weight).all()) for weight in weights.values())
