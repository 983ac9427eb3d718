"""Calibration text: token batches, how they accumulate, and where they come from."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from gqaprune.common.distributed import get_rank_and_world_size
from gqaprune.data.call_checks import list_items
from gqaprune.models.sources import make_absolute


@dataclass(frozen=True)
class CalibrationSet:
    """Calibration text as token batches, with the facts that are needed to choose the same text again.

    Args:
        batches: token ids, each `[batch, tokens]`; in a process group the same list on every rank. Batches of a
            generator are kept in a list.
        accumulation: micro-batches whose gate gradients are summed before their squares or sizes are taken, at least 1.
        seed: seed that chose the windows; also the seed of `random` scores and of swaps.
        corpora: names of the corpora.
        source: name or folder of the model; a folder is kept as an absolute path.

    Raises:
        ValueError: if the accumulation is below 1, or `batches` is not a list of batches.

    Example::

        CalibrationSet(read_windows(tokenizer, ["embedded"], 512, 32).split(4), accumulation=4)
    """

    batches: Sequence[Tensor]
    accumulation: int = 1
    seed: int = 0
    corpora: tuple[str, ...] = ()
    source: str = ""

    def __post_init__(self) -> None:
        if self.accumulation < 1:
            raise ValueError(f"accumulation must be at least 1 micro-batch, got {self.accumulation}; try 4")
        object.__setattr__(self, "batches", list_items(self.batches, "calibration"))
        object.__setattr__(self, "source", make_absolute(self.source))

    @classmethod
    def wrap(cls, batches: "CalibrationSet | Sequence[Tensor]") -> "CalibrationSet":
        """Return a set as it is, and batches as a set with the default settings."""
        return batches if isinstance(batches, CalibrationSet) else cls(batches)

    @property
    def own_batches(self) -> list[int]:
        """Indexes of this rank's batches."""
        return self.list_batches(*get_rank_and_world_size())

    def list_batches(self, rank: int, world_size: int) -> list[int]:
        """List the indexes of one rank's batches: whole accumulations, in order."""
        accumulations = math.ceil(len(self.batches) / self.accumulation)
        return [
            index
            for number in range(rank, accumulations, world_size)
            for index in range(number * self.accumulation, min((number + 1) * self.accumulation, len(self.batches)))
        ]

    def ends_accumulation(self, index: int) -> bool:
        """Return whether a batch is the last of its accumulation."""
        return (index + 1) % self.accumulation == 0 or index + 1 == len(self.batches)
