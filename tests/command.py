"""What tests of the command line share."""

from collections.abc import Callable
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

Run = Callable[..., int]
"""Command and arguments -> exit code: the fixture `run`."""


def read_scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Tag -> steps and values of the TensorBoard events in a folder."""
    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
