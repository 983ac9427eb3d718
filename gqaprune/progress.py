"""Progress bars for long work: what is done, at which rate, and how long it still takes."""

from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from gqaprune.distributed import get_rank_and_world_size

T = TypeVar("T")

console = Console(soft_wrap=True, highlight=False)
"""Where the core prints; quiet it with `console.quiet = True`."""


class _Rate(ProgressColumn):
    def __init__(self, unit: str) -> None:
        super().__init__()
        self.unit = unit

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:.2f} {self.unit}/s")


def track(items: Iterable[T], description: str, unit: str) -> Iterator[T]:
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
        yield from progress.track(items, total=total, description=description)
