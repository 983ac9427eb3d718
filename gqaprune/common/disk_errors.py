"""Explain errors of a full or broken disk in a sentence: the file, the space it needs, and the free space."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_CODES = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
"""No space left, quota exceeded, file too large, read-only file system, input/output error."""
_TORCH = ("PytorchStreamWriter", "inline_container", "iostream error")
"""Words in torch's messages for these errors, which have no number."""


class DiskError(OSError):
    """Error of a full or broken disk; `str` is the whole sentence."""

    def __str__(self) -> str:
        """Return only the sentence, without the number."""
        return str(self.strerror)


@contextmanager
def explain_disk_errors(path: Path, size: int | None = None) -> Iterator[None]:
    """Replace errors of Python, safetensors or torch about a full or broken disk by one that names the file.

    Args:
        path: file or folder to write.
        size: bytes that it needs, if that is known.

    Raises:
        DiskError: instead of such an error.
    """
    try:
        yield
    except DiskError:
        raise
    except Exception as error:
        if (code := _find_code(error)) is None:
            raise
        takes = "" if size is None else f"it needs {_show(size)}, "
        sentence = f"cannot write {path}: {os.strerror(code)}; {takes}{_describe_free(path)}"
        raise DiskError(code, f"{sentence}; free space there or choose another folder", str(path)) from None


def _find_code(error: Exception) -> int | None:
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno if error.errno in _CODES else None
    text = str(error)
    named = (code for code in _CODES if os.strerror(code) in text)
    return next(named, errno.EIO if any(sign in text for sign in _TORCH) else None)


def _describe_free(path: Path) -> str:
    place = next((place for place in (path, *path.parents) if place.is_dir()), Path())
    with suppress(OSError):
        return f"{_show(shutil.disk_usage(place).free)} are free in {place}"
    return f"the free space in {place} is unknown"


def _show(size: int) -> str:
    return f"{size:,} bytes" if size < 1e6 else f"{size / 1e6:,.1f} MB"
