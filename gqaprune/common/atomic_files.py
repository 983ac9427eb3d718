"""Put a new file or folder in the place of an old one, so that a killed program leaves either; where none can be."""

import ctypes
import glob
import os
import shutil
import tempfile
from pathlib import Path

from gqaprune.common.processes import is_gone, name_process

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


def check_can_be_folder(folder: Path) -> None:
    """Refuse a path that is a file or lies below one.

    Raises:
        ValueError: naming the file.
    """
    for place in (folder, *folder.parents):
        if place.exists() and not place.is_dir():
            raise ValueError(f"cannot write to {folder}: {place} is a file; choose another folder or move it away")


def write_atomically(path: Path, content: bytes) -> None:
    """Write to a temporary name beside `path`, then rename; what killed writes of it left there is removed."""
    temporary = path.with_name(f".{path.name}.{name_process()}.tmp")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    for left in _list_left(path):
        left.unlink(missing_ok=True)


def replace_folder(new: Path, folder: Path) -> None:
    """Give `new` the name `folder`; what had it is removed, and so is what killed replacements left beside it.

    On Linux the two names are exchanged in one step. Elsewhere the old folder is moved away first; a program killed
    right then leaves it as `.<name>.<process>.old`.
    """
    old = new
    if not folder.exists():
        new.rename(folder)
    elif not _exchange(new, folder):
        old = folder.with_name(f".{folder.name}.{name_process()}.old")
        folder.rename(old)
        try:
            new.rename(folder)
        except OSError:
            old.rename(folder)
            raise
    shutil.rmtree(old, ignore_errors=True)
    for left in _list_left(folder):
        shutil.rmtree(left, ignore_errors=True)


def make_temporary_folder(path: Path) -> Path:
    """Make a folder under a temporary name beside `path`; those that killed programs left there are removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in _list_left(path):
        shutil.rmtree(left, ignore_errors=True)
    return Path(tempfile.mkdtemp(f".{name_process()}.tmp", f".{path.name}.", path.parent))


def _list_left(path: Path) -> list[Path]:
    """Temporary names of a path whose processes are gone."""
    names = path.parent.glob(f".{glob.escape(path.name)}.*.tmp")
    return [name for name in names if is_gone(name.name.split(".")[-2])]


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two names at once; whether this system and file system can."""
    try:
        rename = ctypes.CDLL(None).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    return bool(rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0)
