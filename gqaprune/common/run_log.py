"""`run.log`: all that a run's console shows, each line with its time; first the command and the versions.

The console hands its lines to the logger `gqaprune` (see `console.py`); Lightning, transformers and others have
loggers of their own, Python's warnings `py.warnings`. Lines wait in memory until the run's folder is known.
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
"""Lines that are held before there is a file."""


class RunLog:
    """Listens from `with` on, to the console, warnings and every logger; writes once `open` has said where.

    Warnings that no handler hears are shown on the console, where Python itself would have shown them.

    Example::

        with RunLog() as log:
            log.open(folder)
    """

    def __init__(self) -> None:
        self._lines = MemoryHandler(_UNTIL_KNOWN, logging.CRITICAL + 1)
        self._undo: list[Callable[[], object]] = []

    def __enter__(self) -> "RunLog":
        """Begin to listen; note the command and the versions."""
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
        file = _LogFile(folder / LOG_FILE, encoding="utf-8", errors="replace")
        file.setFormatter(_Lines())
        self._lines.setTarget(file)
        self._lines.capacity = 1
        self._lines.flush()

    def _listen_to_loggers(self) -> None:
        for own in _list_loggers():
            if self._lines not in own.handlers:
                self._add_handler(own, self._lines)

    def _add_handler(self, own: logging.Logger, handler: logging.Handler) -> None:
        own.addHandler(handler)
        self._undo.append(partial(own.removeHandler, handler))


def _note_thread(stopped: threading.ExceptHookArgs) -> None:
    """Say in a line that a thread has ended by an error, such as a logger's that writes in the background."""
    if isinstance(stopped.exc_value, Exception):
        name = stopped.thread.name if stopped.thread is not None else "a thread"
        console.print(f"{name} stopped: {first_line(stopped.exc_value)}")


class _LogFile(logging.FileHandler):
    """Loses lines where a disk is full, and says so once."""

    is_whole = True

    def handleError(self, record: logging.LogRecord) -> None:
        """Say what went wrong, instead of showing a trace for every line."""
        if self.is_whole:
            self.is_whole = False
            print(f"{for_log(self.baseFilename)} is not whole: {sys.exception()}", file=sys.stderr)

    def close(self) -> None:
        """Close it, though what waits to be written may have no place."""
        with suppress(OSError):
            super().close()


class _UnheardWarnings(RichHandler):
    """Shows messages of libraries that have no handler of their own on standard error: just the text, unwrapped."""

    def __init__(self) -> None:
        self._stderr = SafeConsole(stderr=True, soft_wrap=True)
        super().__init__(logging.WARNING, self._stderr, keywords=[])
        self.addFilter(_is_unheard)

    def emit(self, record: logging.LogRecord) -> None:
        """Show a message, above a progress bar where there is one: by its console, which would log it once more."""
        self.console = console if isinstance(sys.stderr, FileProxy) else self._stderr
        logger.disabled = True
        try:
            super().emit(record)
        finally:
            logger.disabled = False

    def render(
        self, *, record: logging.LogRecord, traceback: Traceback | None, message_renderable: ConsoleRenderable
    ) -> ConsoleRenderable:
        """Show the text alone: time and level are in `run.log`."""
        return Text(self.format(record).rstrip("\n"))


class _Lines(logging.Formatter):
    """Time and level on each line, of a message of several, too."""

    def format(self, record: logging.LogRecord) -> str:
        """The lines of a record."""
        before = f"{self.formatTime(record)} {record.levelname:<7} "
        return "\n".join(before + line for line in for_terminal(super().format(record).rstrip()).split("\n"))


def _is_unheard(record: logging.LogRecord) -> bool:
    """Whether no logger but the root has a handler for it; Python's own warnings have one that does nothing."""
    if record.name == "py.warnings":
        return True
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
