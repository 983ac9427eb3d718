"""The console, and progress bars with work done, speed and remaining time.

Everything that is printed is data and shown unchanged, and no error in showing it ends the work.
"""

import logging
import os
import sys
import time
from collections.abc import Generator, Iterable, Iterator, Sized
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from datetime import timedelta
from io import StringIO
from typing import IO, Any, TypeVar, cast

from rich.console import Console, ConsoleDimensions, ConsoleOptions, ConsoleRenderable, RenderableType, RenderHook
from rich.control import Control
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.segment import Segment
from rich.text import Text

from gqaprune.common.distributed import get_rank_and_world_size
from gqaprune.common.errors import first_line
from gqaprune.common.safe_text import for_log, for_terminal

T = TypeVar("T")

_SILENCE = 60.0
"""Seconds between progress lines if there is no terminal."""

logger = logging.getLogger("gqaprune")
"""Receives every line of the console, quiet or not; `run.log` listens to it."""


_PLAIN = str.maketrans({"→": "->", "–": "-", "×": "x", "✅": "+", "🔶": "~", "❌": "-"})
"""Replacements for gqaprune's signs on consoles that lack them."""
_NARROWEST = 20


class SafeStream:
    """A text stream that accepts every text and never raises: characters it cannot show are written as codes or lost.

    Args:
        stream: stream to write to; None, as Python has for a closed standard output, loses everything.

    Attributes:
        error: why the first text was lost; None if none was lost, or if only the reader is gone.
    """

    def __init__(self, stream: IO[str] | None) -> None:
        self._stream = stream if stream is not None else open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
        self.error: OSError | None = None

    def write(self, text: str) -> int:
        """Write a text, with codes for characters that the stream's encoding lacks."""
        with self._losing():
            try:
                self._stream.write(text)
            except UnicodeEncodeError as error:
                encoded = text.translate(_PLAIN).encode(error.encoding, "backslashreplace")
                self._stream.write(encoded.decode(error.encoding))
        return len(text)

    def flush(self) -> None:
        """Flush the stream."""
        with self._losing():
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        """Return other attributes of the stream."""
        return getattr(self._stream, name)

    @contextmanager
    def _losing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if not isinstance(error, BrokenPipeError):
                self.error = self.error or error
            with suppress(OSError, ValueError), open(os.devnull, "wb") as nowhere:
                os.dup2(nowhere.fileno(), self._stream.fileno())  # else Python fails at exit, on buffered text
        except ValueError:  # the stream was closed
            pass


@contextmanager
def keep_streams_safe() -> Iterator[SafeStream]:
    """Make printing never raise, also in libraries; yield standard output."""
    output, errors = SafeStream(sys.stdout), SafeStream(sys.stderr)
    with redirect_stdout(cast(IO[str], output)), redirect_stderr(cast(IO[str], errors)):
        try:
            yield output
        finally:
            output.flush()
            errors.flush()


class SafeConsole(Console):
    """Shows every string unchanged, on one line: no markup, no emoji codes, no terminal controls.

    Use `Text` for styles. An error in showing something is logged and never ends the work.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(highlight=False, markup=False, emoji=False, **options)

    @property
    def file(self) -> IO[str]:
        """The stream that it prints to, which accepts every text."""
        file = super().file
        return file if isinstance(file, SafeStream) else cast(IO[str], SafeStream(file))

    @file.setter
    def file(self, file: IO[str]) -> None:
        self._file = file

    @property
    def size(self) -> ConsoleDimensions:
        """Columns and rows, with enough columns to show something whatever `COLUMNS` says."""
        width, height = super().size
        return ConsoleDimensions(max(width, _NARROWEST), height)

    @size.setter
    def size(self, size: tuple[int, int]) -> None:
        self._width, self._height = size

    def print(self, *objects: Any, **options: Any) -> None:
        """Print objects, or skip them after an error."""
        try:
            super().print(*objects, **options)
        except Exception as error:  # no error in printing is worth losing the work
            logger.warning("a message could not be shown: %s", first_line(error))

    def render_str(self, text: str, **options: Any) -> Text:
        """Escape line breaks in a string, such as a table's cell, before it is measured."""
        return super().render_str(for_log(text), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Render any object, with terminal controls escaped."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=for_terminal(segment.text))


class _LineLogger(RenderHook):
    """Sends everything that a console prints to the logger, line by line and without colors."""

    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        """Log objects, and return them unchanged; progress bars are left out, because they print only controls."""
        printed = [one for one in renderables if not isinstance(one, Control)]
        if printed and logger.isEnabledFor(logging.INFO):
            is_text = all(isinstance(one, Text) for one in printed)  # sentences are not wrapped
            text = StringIO()
            SafeConsole(file=text, width=120).print(*printed, soft_wrap=is_text)
            for line in text.getvalue().splitlines():
                logger.info("%s", line.rstrip())
        return renderables


console = SafeConsole(soft_wrap=True)
"""The console of the package; `console.quiet = True` turns it off."""
console.push_render_hook(_LineLogger())


@contextmanager
def keep_going(what: str) -> Iterator[None]:
    """Skip a part of a report after an error in it, with a console line, instead of ending the work.

    Args:
        what: name of the part.
    """
    try:
        yield
    except Exception as error:  # no error in a report is worth losing the work
        console.print(f"{what} is left out: {first_line(error)}")


class _Rate(ProgressColumn):
    def __init__(self, unit: str) -> None:
        super().__init__()
        self.unit = unit

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:.2f} {self.unit}/s")


def _describe_pace(done: int, total: int | None, unit: str, seconds: float) -> str:
    """Describe work done, speed and remaining time."""
    rate = done / seconds
    pace = f"{rate:.2g} {unit}/s" if rate >= 0.1 else f"{1 / rate:.2g} s for each of the {unit}"
    if total is None:
        return f"{done} {unit}, {pace}"
    return f"{done} of {total} {unit}, {pace}, {timedelta(seconds=round((total - done) / rate))} left"


def track(items: Iterable[T], description: str, unit: str) -> Generator[T, None, None]:
    """Iterate with a progress bar on rank 0.

    Args:
        items: items to iterate over; their number is the bar's end.
        description: description of the work.
        unit: plural name of the items, for the rate.
    """
    total = len(items) if isinstance(items, Sized) else None
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        _Rate(unit),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    hidden = get_rank_and_world_size()[0] > 0
    with Progress(*columns, console=console, disable=hidden) as progress:
        began = said = time.monotonic()
        for count, item in enumerate(progress.track(items, total=total, description=for_log(description)), start=1):
            yield item
            now = time.monotonic()
            if not hidden and not console.is_terminal and now - said >= _SILENCE:  # without a terminal no bar moves
                said = now
                console.print(f"{description}: {_describe_pace(count, total, unit, now - began)}", markup=False)
        if not hidden:  # the log has no bars, so it gets a line
            done = sum(task.completed for task in progress.tasks)
            logger.info("%s: %d %s in %.1f s", description, done, unit, time.monotonic() - began)
