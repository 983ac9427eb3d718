"""Write `run.log`: the command, the versions, and everything that a run's console shows, each line with its time.

The console sends its lines to the logger `gqaprune` (see `console.py`); Lightning, transformers and others have their
own loggers, and Python's warnings have `py.warnings`. Lines are kept in memory until the run's folder is known.
"""

import logging
import shlex
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from logging.handlers import MemoryHandler
from pathlib import Path
from types import TracebackType

from rich.console import ConsoleRenderable
from rich.file_proxy import FileProxy
from rich.logging import RichHandler
from rich.text import Text
from rich.traceback import Traceback

from gqaprune.common.console import SafeConsole, console, logger
from gqaprune.common.errors import first_line
from gqaprune.common.provenance import get_command, get_versions
from gqaprune.common.safe_text import for_log, for_terminal

LOG_FILE = "run.log"

_UNTIL_KNOWN = 100_000
"""Largest number of lines kept in memory before there is a file."""


class RunLog:
    """Collects lines of the console, warnings and every logger within `with`; writes them after `open`.

    Warnings without a handler are shown on the console, where Python itself would show them.

    Example::

        with RunLog() as log:
            log.open(folder)
    """

    def __init__(self) -> None:
        self._lines = MemoryHandler(_UNTIL_KNOWN, logging.CRITICAL + 1)
        self._undo: list[Callable[[], object]] = []

    def __enter__(self) -> "RunLog":
        """Begin to listen; log the command and the versions."""
        if not logging.root.handlers:
            self._add_handler(logging.root, _UnheardWarnings())
        self._listen_to_loggers()
        level, propagates = logger.level, logger.propagate
        logger.setLevel(logging.INFO)
        logger.propagate = False
        self._undo += [partial(logger.setLevel, level), partial(setattr, logger, "propagate", propagates)]
        logging.captureWarnings(True)
        self._undo.append(partial(logging.captureWarnings, False))
        self._undo.append(partial(setattr, threading, "excepthook", threading.excepthook))
        threading.excepthook = _note_thread
        if command := get_command():
            logger.info("command: %s", shlex.join(command))
        logger.info("versions: %s", ", ".join(f"{name} {version}" for name, version in get_versions().items()))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        """Log the error that ended the run, if there was one, and stop."""
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
        """Write all lines so far and all that follow to a file in a folder, appending to an earlier run's log."""
        self._listen_to_loggers()  # some loggers are new
        folder.mkdir(parents=True, exist_ok=True)
        file = _LogFile(folder / LOG_FILE, encoding="utf-8", errors="replace")
        file.setFormatter(_Lines())
        self._lines.setTarget(file)
        self._lines.capacity = 1
        self._lines.flush()

    def _listen_to_loggers(self) -> None:
        for target in _list_loggers():
            if self._lines not in target.handlers:
                self._add_handler(target, self._lines)

    def _add_handler(self, target: logging.Logger, handler: logging.Handler) -> None:
        target.addHandler(handler)
        self._undo.append(partial(target.removeHandler, handler))


def _note_thread(stopped: threading.ExceptHookArgs) -> None:
    """Print that a thread has ended with an error, such as a logger's background thread."""
    if isinstance(stopped.exc_value, Exception):
        name = stopped.thread.name if stopped.thread is not None else "a thread"
        console.print(f"{name} stopped: {first_line(stopped.exc_value)}")


class _LogFile(logging.FileHandler):
    """Drops lines when the disk is full, and reports that once."""

    is_whole = True

    def handleError(self, record: logging.LogRecord) -> None:
        """Print the first error, instead of a trace for every line."""
        if self.is_whole:
            self.is_whole = False
            print(f"{for_log(self.baseFilename)} is incomplete: {sys.exception()}", file=sys.stderr)

    def close(self) -> None:
        """Close the file, even if buffered lines cannot be written."""
        with suppress(OSError):
            super().close()


class _UnheardWarnings(RichHandler):
    """Shows warnings of libraries without a handler on standard error: only the text, unwrapped."""

    def __init__(self) -> None:
        self._stderr = SafeConsole(stderr=True, soft_wrap=True)
        super().__init__(logging.WARNING, self._stderr, keywords=[])
        self.addFilter(_is_unheard)

    def emit(self, record: logging.LogRecord) -> None:
        """Show a message above a progress bar, if there is one, by the bar's console; that must not log it again."""
        self.console = console if isinstance(sys.stderr, FileProxy) else self._stderr
        logger.disabled = True
        try:
            super().emit(record)
        finally:
            logger.disabled = False

    def render(
        self, *, record: logging.LogRecord, traceback: Traceback | None, message_renderable: ConsoleRenderable
    ) -> ConsoleRenderable:
        """Show only the text, because time and level are in `run.log`."""
        return Text(self.format(record).rstrip("\n"))


class _Lines(logging.Formatter):
    """Writes time and level on each line, also of messages with several lines."""

    def format(self, record: logging.LogRecord) -> str:
        """Format the lines of a record."""
        before = f"{self.formatTime(record)} {record.levelname:<7} "
        return "\n".join(before + line for line in for_terminal(super().format(record).rstrip()).split("\n"))


def _is_unheard(record: logging.LogRecord) -> bool:
    """Return whether only the root logger has a handler for a record; Python's warnings have one that does nothing."""
    if record.name == "py.warnings":
        return True
    one: logging.Logger | None = logging.getLogger(record.name)
    while one is not None and one is not logging.root:
        if one.handlers:
            return False
        one = one.parent
    return True


def _list_loggers() -> list[logging.Logger]:
    """List the root logger, and all loggers that do not propagate to it."""
    named = [one for one in logging.root.manager.loggerDict.values() if isinstance(one, logging.Logger)]
    silent = [one for one in named if not one.propagate and one is not logger]
    return [logging.root, logger, *silent]
