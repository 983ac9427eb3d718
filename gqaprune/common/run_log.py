"""`run.log`: all that a run's console shows, each line with its time; first the command and the versions.

The console hands its lines to the logger `gqaprune` (see `progress.py`); Lightning, transformers and others have
loggers of their own. Lines wait in memory until the run's folder is known.
"""

import logging
import shlex
import sys
import warnings
from collections.abc import Callable
from functools import partial
from logging.handlers import MemoryHandler
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.file_proxy import FileProxy

from gqaprune.common.console import logger
from gqaprune.common.provenance import get_command, get_versions

LOG_FILE = "run.log"

_UNTIL_KNOWN = 100_000
"""Lines that are held before there is a file."""


class RunLog:
    """Listens from `with` on, to the console, warnings and every logger; writes once `open` has said where.

    Example::

        with RunLog() as log:
            log.open(folder)
    """

    def __init__(self) -> None:
        self._lines = MemoryHandler(_UNTIL_KNOWN, logging.CRITICAL + 1)
        self._undo: list[Callable[[], object]] = []

    def __enter__(self) -> "RunLog":
        """Begin to listen; note the command and the versions."""
        self._listen_to_loggers()
        level, propagates = logger.level, logger.propagate
        logger.setLevel(logging.INFO)
        logger.propagate = False
        self._undo += [partial(logger.setLevel, level), partial(setattr, logger, "propagate", propagates)]
        self._listen_to_warnings()
        if command := get_command():
            logger.info("command: %s", shlex.join(command))
        logger.info("versions: %s", ", ".join(f"{name} {version}" for name, version in get_versions().items()))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        """Note what ended it, if that was an error, and stop."""
        if error is not None and not isinstance(error, (SystemExit, KeyboardInterrupt)):
            logger.error("stopped by an error", exc_info=error)
        for undo in reversed(self._undo):
            undo()
        self._undo.clear()
        file = self._lines.target
        self._lines.close()
        if file is not None:
            file.close()

    def open(self, folder: Path) -> None:
        """Write what was heard so far and all that follows into a folder, after what earlier runs left there."""
        self._listen_to_loggers()  # some have been made since
        folder.mkdir(parents=True, exist_ok=True)
        file = logging.FileHandler(folder / LOG_FILE, encoding="utf-8", errors="replace")
        file.setFormatter(_Lines())
        self._lines.setTarget(file)
        self._lines.capacity = 1
        self._lines.flush()

    def _listen_to_loggers(self) -> None:
        if (rest := logging.lastResort) is not None and not logging.root.handlers:
            # Python shows what no handler hears; now that there is one, it has to be told to.
            rest.addFilter(_is_unheard)
            logging.root.addHandler(rest)
            self._undo += [partial(logging.root.removeHandler, rest), partial(rest.removeFilter, _is_unheard)]
        for own in _list_loggers():
            if self._lines not in own.handlers:
                own.addHandler(self._lines)
                self._undo.append(partial(own.removeHandler, self._lines))

    def _listen_to_warnings(self) -> None:
        show = warnings.showwarning

        def show_and_note(message: Any, category: type[Warning], *place: Any, **more: Any) -> None:
            show(message, category, *place, **more)
            if not isinstance(sys.stderr, FileProxy):  # a progress bar's, which hands all to the console
                logger.warning("%s: %s", category.__name__, message)

        warnings.showwarning = show_and_note
        self._undo.append(partial(setattr, warnings, "showwarning", show))


class _Lines(logging.Formatter):
    """Time and level on each line, of a message of several, too."""

    def format(self, record: logging.LogRecord) -> str:
        """The lines of a record."""
        before = f"{self.formatTime(record)} {record.levelname:<7} "
        return "\n".join(before + line for line in super().format(record).splitlines() or [""])


def _is_unheard(record: logging.LogRecord) -> bool:
    """Whether no logger but the root has a handler for it."""
    one: logging.Logger | None = logging.getLogger(record.name)
    while one is not None and one is not logging.root:
        if one.handlers:
            return False
        one = one.parent
    return True


def _list_loggers() -> list[logging.Logger]:
    """The root of all, and those that keep what they hear from it."""
    named = [one for one in logging.root.manager.loggerDict.values() if isinstance(one, logging.Logger)]
    silent = [one for one in named if not one.propagate and one is not logger]
    return [logging.root, logger, *silent]
