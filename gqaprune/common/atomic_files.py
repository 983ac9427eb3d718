"""Replace files and folders atomically, so that a killed program leaves either the old or the new one.

Work in progress has a temporary name beside the final one, and a lock (`filelock`) that the system releases when its
process ends, however it ends. So the next program can reuse or remove what a killed program left.
"""

import ctypes
import glob
import os
import shutil
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from gqaprune.common.disk_errors import explain_disk_errors

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_TEMPORARY = ".gqaprune.tmp"
_LOCK = ".gqaprune.lock"
_SCRATCH = ".scratch"
_HELD = ".held"
"""Name of the lock in a scratch folder, held while its owner runs."""


def check_can_be_folder(folder: Path) -> None:
    """Raise an error if this process cannot create the folder or write to it, or its name is not valid UTF-8.

    Raises:
        ValueError: with the file that is in the way, or the system's message.
    """
    try:
        str(folder).encode()
        for place in (folder, *folder.parents):
            if place.exists() and not place.is_dir():
                raise ValueError(f"cannot write to {folder}: {place} is a file; choose another folder or move it away")
        _rehearse_writing(folder.absolute())
    except UnicodeEncodeError:
        raise ValueError(f"cannot write to {folder}: its name is not valid UTF-8; choose another name") from None
    except OSError as error:
        raise ValueError(f"cannot write to {folder}: {error.strerror}; choose another folder") from None


def _rehearse_writing(folder: Path) -> None:
    """Create and remove the missing folders under a temporary name, with the longest name that will be needed."""
    place = next(parent for parent in (folder, *folder.parents) if parent.is_dir())
    with tempfile.TemporaryDirectory(_TEMPORARY, ".", place) as attempt:
        Path(attempt, "folder", folder.relative_to(place)).with_name(f".{folder.name}{_LOCK}").mkdir(parents=True)


@contextmanager
def reserve_name(path: Path) -> Iterator[Path]:
    """Let one process at a time write to `path`; yield the temporary name beside it to write to."""
    lock = FileLock(path.with_name(f".{path.name}{_LOCK}"))
    lock.acquire()
    try:
        yield path.with_name(f".{path.name}{_TEMPORARY}")
    finally:
        remove_lock(lock)


def remove_leftovers(*folders: Path) -> None:
    """Remove unfinished files of killed programs from folders; those of running programs stay."""
    for folder in folders:
        for path in folder.glob(f".*{_LOCK}"):
            lock = FileLock(path, blocking=False)
            with suppress(Timeout, OSError):
                lock.acquire()
                _remove(path.with_name(path.name.removesuffix(_LOCK) + _TEMPORARY))
                remove_lock(lock)
        for scratch in folder.glob(f".*{_SCRATCH}"):
            _remove_if_left(scratch)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _remove_if_left(scratch: Path) -> None:
    """Remove a scratch folder whose owner was killed; folders of other programs have no lock and stay."""
    if (scratch / _HELD).exists():
        with suppress(Timeout, OSError), FileLock(scratch / _HELD, blocking=False):
            shutil.rmtree(scratch, ignore_errors=True)


def remove_lock(lock: FileLock) -> None:
    """Release a lock and remove its file, which `filelock` leaves on Unix.

    The file is removed first: waiting processes notice that and make a new one (since `filelock` 3.20.4).
    """
    with suppress(OSError):  # Windows cannot remove it while it is held, and removes it by itself
        Path(lock.lock_file).unlink()
    lock.release()


def write_atomically(path: Path, content: bytes) -> None:
    """Write to a temporary name beside `path`, then rename; leftovers of a killed write are overwritten."""
    with explain_disk_errors(path, len(content)), reserve_name(path) as temporary:
        try:
            temporary.write_bytes(content)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def replace_folder(folder: Path, size: int | None = None) -> Iterator[Path]:
    """Yield a new, empty folder to fill, which then replaces `folder`; after an error the old one stays.

    `os.replace` refuses folders that are not empty. Instead, Linux exchanges the two names in one step; elsewhere the
    old folder is moved away first, and a program killed right then leaves it as `.<name>.old`.

    Args:
        folder: folder to make or replace.
        size: bytes of its content, if that is known.

    Raises:
        DiskError: if there is not enough space.
    """
    with explain_disk_errors(folder, size), reserve_name(folder) as new:
        shutil.rmtree(new, ignore_errors=True)  # left by a killed program
        new.mkdir()
        try:
            yield new
            _replace(new, folder)
        finally:
            shutil.rmtree(new, ignore_errors=True)  # after an exchange, this is the old folder


def _replace(new: Path, folder: Path) -> None:
    old = folder.with_name(f".{folder.name}.old")
    if not folder.exists():
        os.replace(new, folder)
    elif not _exchange(new, folder):
        shutil.rmtree(old, ignore_errors=True)
        os.replace(folder, old)
        try:
            os.replace(new, folder)
        except OSError:
            os.replace(old, folder)
            raise
    shutil.rmtree(old, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two names in one step; return whether system and file system support it. Python has no function."""
    try:
        rename = ctypes.CDLL(None).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    return bool(rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0)


class ScratchFolder:
    """A temporary folder beside a path, removed with this object.

    Leftovers of killed programs beside the same path are removed first.

    Args:
        path: path whose name the folder's name begins with; its parent is created if it is missing.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with reserve_name(path):  # so that nobody removes the new folder before it is locked
            for left in path.parent.glob(f".{glob.escape(path.name)}.*{_SCRATCH}"):
                _remove_if_left(left)
            self.path = Path(tempfile.mkdtemp(_SCRATCH, f".{path.name}.", path.parent))
            held = FileLock(self.path / _HELD, thread_local=False)  # any thread may be the last to need it
            held.acquire()
        weakref.finalize(self, _remove_scratch, self.path, held)


def _remove_scratch(folder: Path, held: FileLock) -> None:
    held.release()  # Windows cannot remove an open file
    shutil.rmtree(folder, ignore_errors=True)
