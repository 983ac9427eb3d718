"""The console, and progress bars for long work: what is done, at which rate, and how long it still takes."""

import io
import logging
import time
from collections.abc import Generator, Iterable, Sized
from typing import Any, TypeVar

from rich.console import Console
from rich.control import Control
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from gqaprune.common.distributed import get_rank_and_world_size

T = TypeVar("T")

logger = logging.getLogger("gqaprune")
"""Hears every line of the console, quiet or not; `run.log` listens to it."""


class _HeardConsole(Console):
    """Prints, and hands the same, line by line and without colors, to the logger."""

    def print(self, *objects: Any, **options: Any) -> None:
        """As rich's own."""
        super().print(*objects, **options)
        if logger.isEnabledFor(logging.INFO) and not all(isinstance(one, Control) for one in objects):
            text = io.StringIO()
            Console(file=text, width=120, soft_wrap=True, highlight=False).print(*objects, **options)
            for line in text.getvalue().splitlines():
                logger.info("%s", line.rstrip())


console = _HeardConsole(soft_wrap=True, highlight=False)
"""Where the core prints; quiet it with `console.quiet = True`."""


class _Rate(ProgressColumn):
    def __init__(self, unit: str) -> None:
        super().__init__()
        self.unit = unit

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:.2f} {self.unit}/s")


def track(items: Iterable[T], description: str, unit: str) -> Generator[T, None, None]:
    """Iterate with a progress bar on rank 0.

    Args:
        items: what to iterate; its length is the bar's end.
        description: what is being done.
        unit: plural name of the items, for the rate.
    """
    total = len(items) if isinstance(items, Sized) else None
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        _Rate(unit),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    hidden = get_rank_and_world_size()[0] > 0
    with Progress(*columns, console=console, disable=hidden) as progress:
        began = time.monotonic()
        yield from progress.track(items, total=total, description=description)
        if not hidden:  # of the bar itself only its end stays on a console, and none of it in a log
            done = sum(task.completed for task in progress.tasks)
            logger.info("%s: %d %s in %.1f s", description, done, unit, time.monotonic() - began)
