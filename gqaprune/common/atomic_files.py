"""Put a new file or folder in the place of an old one, so that a killed program leaves either; where none can be.

Work in progress has a temporary name beside the final one and a lock (`filelock`) that the system releases when its
process ends, however it ends: what a killed program left is free for the next one to take, and to remove.
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
"""Lock in a scratch folder whose owner runs."""


def check_can_be_folder(folder: Path) -> None:
    """Refuse a path that is a file, lies below one, or that this process cannot make a folder of or write to.

    Others have to be able to write its name.

    Raises:
        ValueError: naming the file, or saying what the system says.
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
    """Make and remove what is missing of a folder, under a name of its own, and the longest name that it will need."""
    place = next(parent for parent in (folder, *folder.parents) if parent.is_dir())
    with tempfile.TemporaryDirectory(_TEMPORARY, ".", place) as attempt:
        Path(attempt, "folder", folder.relative_to(place)).with_name(f".{folder.name}{_LOCK}").mkdir(parents=True)


@contextmanager
def reserve_name(path: Path) -> Iterator[Path]:
    """Let one process at a time write to `path`; yields the temporary name to write to, beside it."""
    lock = FileLock(path.with_name(f".{path.name}{_LOCK}"))
    lock.acquire()
    try:
        yield path.with_name(f".{path.name}{_TEMPORARY}")
    finally:
        remove_lock(lock)


def remove_leftovers(*folders: Path) -> None:
    """Remove what killed programs were writing in some folders; what a running one writes there stays."""
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
    """Remove a scratch folder whose owner was killed; one that was not made here has no lock."""
    if (scratch / _HELD).exists():
        with suppress(Timeout, OSError), FileLock(scratch / _HELD, blocking=False):
            shutil.rmtree(scratch, ignore_errors=True)


def remove_lock(lock: FileLock) -> None:
    """Release a lock that is held, and remove its file, which `filelock` leaves there on Unix.

    The file goes first: processes that wait for it notice, and make a new one (since `filelock` 3.20.4).
    """
    with suppress(OSError):  # Windows cannot remove it yet, and does so by itself
        Path(lock.lock_file).unlink()
    lock.release()


def write_atomically(path: Path, content: bytes) -> None:
    """Write to a temporary name beside `path`, then rename; what a killed write of it left there is overwritten."""
    with explain_disk_errors(path, len(content)), reserve_name(path) as temporary:
        try:
            temporary.write_bytes(content)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def replace_folder(folder: Path, size: int | None = None) -> Iterator[Path]:
    """Yield a new, empty folder to fill, which then takes the place of `folder`; after an error that stays.

    `os.replace` refuses folders that are not empty. On Linux the two names are exchanged in one step instead. Where
    that is not possible the old folder is moved away first; a program killed right then leaves it as `.<name>.old`.

    Args:
        folder: to make or replace.
        size: bytes that its content takes, if that is known.

    Raises:
        DiskError: if there is no room for it.
    """
    with explain_disk_errors(folder, size), reserve_name(folder) as new:
        shutil.rmtree(new, ignore_errors=True)  # left by a killed program
        new.mkdir()
        try:
            yield new
            _replace(new, folder)
        finally:
            shutil.rmtree(new, ignore_errors=True)  # after an exchange the old one


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
    """Exchange two names at once; whether this system and file system can. Python has no function for it."""
    try:
        rename = ctypes.CDLL(None).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    return bool(rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0)


class ScratchFolder:
    """A folder of its own beside a path, removed with this object.

    What killed programs left beside the same path is removed first.

    Args:
        path: what the folder's name begins with; its parent is made if it is not there.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with reserve_name(path):  # nobody looks at the new folder before it is held
            for left in path.parent.glob(f".{glob.escape(path.name)}.*{_SCRATCH}"):
                _remove_if_left(left)
            self.path = Path(tempfile.mkdtemp(_SCRATCH, f".{path.name}.", path.parent))
            held = FileLock(self.path / _HELD, thread_local=False)  # any thread may be the last to need it
            held.acquire()
        weakref.finalize(self, _remove_scratch, self.path, held)


def _remove_scratch(folder: Path, held: FileLock) -> None:
    held.release()  # Windows removes no file that is open
    shutil.rmtree(folder, ignore_errors=True)
