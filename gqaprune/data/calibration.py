"""What a model is calibrated on: token batches, how they accumulate, and where they come from."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from gqaprune.common.distributed import get_rank_and_world_size
from gqaprune.data.call_checks import list_items
from gqaprune.models.sources import make_absolute


@dataclass(frozen=True)
class CalibrationSet:
    """Calibration text as token batches, with what has to be known to choose it again.

    Args:
        batches: token ids, each `[batch, tokens]`; in a process group the same list on every rank. What a generator
            yields is kept.
        accumulation: micro-batches whose gate gradients are summed before they are squared or their size is taken.
        seed: seed that chose the windows; of `random` scores and of swaps, too.
        corpora: names of the corpora.
        source: name or folder of the model; of a folder the absolute path is kept.

    Raises:
        ValueError: if the accumulation is below 1, or there are no batches to go through.

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
            raise ValueError(f"accumulation must be at least 1 micro-batch, got {self.accumulation}")
        object.__setattr__(self, "batches", list_items(self.batches, "calibration"))
        object.__setattr__(self, "source", make_absolute(self.source))

    @classmethod
    def wrap(cls, batches: "CalibrationSet | Sequence[Tensor]") -> "CalibrationSet":
        """Take batches alone as a set with the defaults, and a set as it is."""
        return batches if isinstance(batches, CalibrationSet) else cls(batches)

    @property
    def own_batches(self) -> list[int]:
        """Indexes of this rank's batches."""
        return self.list_batches(*get_rank_and_world_size())

    def list_batches(self, rank: int, world_size: int) -> list[int]:
        """Indexes of the batches of one rank of several, whole accumulations in order."""
        accumulations = math.ceil(len(self.batches) / self.accumulation)
        return [
            index
            for number in range(rank, accumulations, world_size)
            for index in range(number * self.accumulation, min((number + 1) * self.accumulation, len(self.batches)))
        ]

    def ends_accumulation(self, index: int) -> bool:
        """Whether a batch is the last of its accumulation."""
        return (index + 1) % self.accumulation == 0 or index + 1 == len(self.batches)
