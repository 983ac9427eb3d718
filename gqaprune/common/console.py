"""The console, and progress bars for long work: what is done, at which rate, and how long it still takes."""

import io
import logging
import time
from collections.abc import Generator, Iterable, Sized
from typing import TypeVar

from rich.console import Console, ConsoleRenderable, RenderHook
from rich.control import Control
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from gqaprune.common.distributed import get_rank_and_world_size

T = TypeVar("T")

logger = logging.getLogger("gqaprune")
"""Hears every line of the console, quiet or not; `run.log` listens to it."""


class _LineLogger(RenderHook):
    """Hands what a console prints to the logger, line by line and without colors."""

    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        """Log them, and let them be printed as they are; a progress bar prints itself by controls alone."""
        printed = [one for one in renderables if not isinstance(one, Control)]
        if printed and logger.isEnabledFor(logging.INFO):
            is_text = all(isinstance(one, Text) for one in printed)  # sentences are not wrapped
            text = io.StringIO()
            Console(file=text, width=120, highlight=False).print(*printed, soft_wrap=is_text)
            for line in text.getvalue().splitlines():
                logger.info("%s", line.rstrip())
        return renderables


console = Console(soft_wrap=True, highlight=False)
"""Where the core prints; quiet it with `console.quiet = True`."""
console.push_render_hook(_LineLogger())


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
