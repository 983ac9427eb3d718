"""The table of a run's stages: forward passes of each, and about how long it takes on a device."""

from collections.abc import Sequence

from rich.table import Table

from gqaprune.commands.device_speed import show_time
from gqaprune.planning.costs.device import Device
from gqaprune.planning.costs.stages import StageCost
from gqaprune.planning.stages import TRAINING

EFFICIENCY = 0.6
"""Share of a matrix product's speed that a whole model reaches."""


def estimate_seconds(stage: StageCost, device: Device) -> float:
    """About how long a stage takes."""
    return device.find_least_seconds(stage.cost) / EFFICIENCY


def build_stages_table(
    stages: Sequence[StageCost], device: Device, is_uncounted: bool = False, about: str = ""
) -> Table:
    """One row per stage.

    Args:
        stages: in their order.
        device: whose speeds were tried.
        is_uncounted: whether the training text has not been counted.
        about: what the estimate is of, for the caption.
    """
    total = sum(estimate_seconds(stage, device) for stage in stages)
    table = Table(title=f"stages, about {show_time(total)} on this machine", title_justify="left", caption_style="dim")
    for name, justify in (("", "left"), ("stage", "left"), ("forward passes", "right"), ("about", "right")):
        table.add_column(name, justify=justify, overflow="fold")  # type: ignore[arg-type]
    table.caption = f"{about}passes over the text that a stage reads, by arithmetic; times by speeds tried now"
    for number, stage in enumerate(stages, start=1):
        passes, seconds = (
            (f"{stage.passes:.2f}", show_time(estimate_seconds(stage, device))) if stage.passes else ("", "")
        )
        if stage.name == TRAINING and is_uncounted:
            seconds = "its text is not counted yet"
        table.add_row(f"{number} of {len(stages)}", stage.name, passes, seconds)
    return table
