"""Turn any error of a library that reads a model's files into one sentence that names them."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from gqaprune.common.errors import first_line

_FOR_READERS = (ImportError, OSError, SafetensorError, StrictDataclassError, ValueError)
"""Errors with a clear text; for all others, the type is added."""
_PANIC = "PanicException"
"""Error of Rust libraries, which is not an `Exception` and whose class cannot be imported."""
_LONGEST = 400
"""Largest number of a reason's or name's characters: some libraries quote the whole text that they could not read."""


class LoadingError(ValueError):
    """What cannot be loaded, from where, and why; guards around another guard leave it unchanged."""


ADVICE = ": use a local folder, or set HF_ENDPOINT to a mirror of the hub"
"""Advice if the hub does not answer."""


@contextmanager
def guard_loading(what: str, source: str | Path, file: str = "") -> Iterator[None]:
    """Turn any error within the context into one sentence with the source.

    Args:
        what: kind of thing that is loaded, such as `model` or `tokenizer`.
        source: a folder, a file or a hub name.
        file: file of the source that is read, if it is known.

    Raises:
        LoadingError: for any error, which becomes its cause.
    """
    try:
        yield
    except LoadingError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != _PANIC:
            raise
        raise make_loading_error(what, source, _describe(error), file) from error


def make_loading_error(what: str, source: str | Path, reason: str, file: str = "") -> LoadingError:
    """Make the error of something that cannot be loaded; it says if the source is not a local folder, after a typo."""
    place = "" if os.path.lexists(source) or str(source).endswith(".gguf") else ", which is not a local folder"
    where = f"{file}: " if file and file not in reason else ""
    advice = ADVICE if place and "couldn't connect" in reason else ""
    return LoadingError(f"cannot load a {what} from {_cut(repr(str(source)))}{place}: {where}{reason}{advice}")


def _describe(error: BaseException) -> str:
    reason, kind = first_line(error), type(error).__name__
    if not isinstance(error, _FOR_READERS) and reason != kind:
        reason = f"{kind}: {reason}"
    return _cut(reason)


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"
