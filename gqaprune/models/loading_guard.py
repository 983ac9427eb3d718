"""One guard for all that reads a model: whatever a library throws on its files becomes one sentence that names them."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from gqaprune.common.errors import first_line

_FOR_READERS = (ImportError, OSError, SafetensorError, StrictDataclassError, ValueError)
"""Errors whose text says what is wrong; of all others the type is named, too."""
_PANIC = "PanicException"
"""What Rust libraries throw, which is no `Exception`; its class cannot be imported."""
_LONGEST = 400
"""Characters of a reason, or of a name: some libraries repeat what they could not read."""


class LoadingError(ValueError):
    """Says what cannot be loaded, from where, and why; a guard within another has said it already."""


ADVICE = ": give a folder, or a mirror of the hub by HF_ENDPOINT"
"""What to do where the hub does not answer."""


@contextmanager
def guard_loading(what: str, source: str | Path, file: str = "") -> Iterator[None]:
    """Say in one sentence what goes wrong while the context lasts, and from where it was to be loaded.

    Args:
        what: it is, such as `model` or `tokenizer`.
        source: a folder, a file or a hub name.
        file: of the source that is read, where it is known.

    Raises:
        LoadingError: whatever was raised, which is its cause.
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
    """Why something cannot be loaded, and that a hub name is no folder here: it may be a mistyped one."""
    place = "" if os.path.lexists(source) or str(source).endswith(".gguf") else ", which is no folder here"
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
