"""What a criterion is: scores from a calibration, and the options that shape them."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from gqaprune.common.distributed import get_rank_and_world_size
from gqaprune.models.architecture import Block
from gqaprune.plan import BlockKey

Scores = dict[BlockKey, Tensor]
"""Score of every unit of every block, float64 `[units]` on the CPU."""

REDUCTIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda members_MU: members_MU.sum(0),
    "mean": lambda members_MU: members_MU.mean(0),
    "max": lambda members_MU: members_MU.amax(0),
    "prod": lambda members_MU: members_MU.prod(0),
}
"""Name -> how the contributions of a unit's members (its rows of each input projection, its output columns) become one
score: `[members, units]` -> `[units]`. LLM-Pruner's `grouping_strategy`."""

NORMALIZATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "none": torch.ones_like,
    "mean": lambda score_U: score_U.mean(),
    "sum": lambda score_U: score_U.sum(),
    "max": lambda score_U: score_U.max(),
}
"""Name -> what each block's scores are divided by before blocks are compared."""


@dataclass(frozen=True)
class ScoringOptions:
    """What shapes scores besides the criterion.

    Args:
        reduction: how a unit's members combine (`sum`, `mean`, `max`, `prod`), for the criteria over weights:
            `param_first`, `param_second`, `param_mix`, `vectorize`, `l1`, `l2`.
        normalization: what each block's scores are divided by: `none`, or their `mean`, `sum` or `max`.
        obs_ridge: of `obs`, as a multiple of the mean squared input; above 0.
        seed: of `random`.

    Raises:
        ValueError: if an option is out of its bounds.
    """

    reduction: str = "sum"
    normalization: str = "none"
    obs_ridge: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        for name, members in (("reduction", REDUCTIONS), ("normalization", NORMALIZATIONS)):
            if getattr(self, name) not in members:
                raise ValueError(f"{name} must be one of {', '.join(members)}, got {getattr(self, name)!r}")
        if not 0 < self.obs_ridge < math.inf:
            raise ValueError(f"obs_ridge must be above 0 and finite, got {self.obs_ridge}; 0.1 works")


@dataclass(frozen=True)
class Calibration:
    """What units are scored on.

    Args:
        model: the dense causal LM.
        blocks: blocks to score.
        batches: token ids, each `[batch, tokens]`, the same list on every rank.
        accumulate: micro-batches per accumulation.
        name: what the progress bar says.
    """

    model: PreTrainedModel
    blocks: Sequence[Block]
    batches: Sequence[Tensor]
    accumulate: int = 1
    name: str = "calibration"

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        device: torch.device = next(self.model.parameters()).device
        return device

    @property
    def own_batches(self) -> list[int]:
        """Indexes of this rank's batches."""
        return self.list_batches(*get_rank_and_world_size())

    def list_batches(self, rank: int, world_size: int) -> list[int]:
        """Indexes of the batches of one rank of several, whole accumulations in order."""
        accumulations = math.ceil(len(self.batches) / self.accumulate)
        return [
            index
            for number in range(rank, accumulations, world_size)
            for index in range(number * self.accumulate, min((number + 1) * self.accumulate, len(self.batches)))
        ]

    def ends_accumulation(self, index: int) -> bool:
        """Whether a batch is the last of its accumulation."""
        return (index + 1) % self.accumulate == 0 or index + 1 == len(self.batches)


class Criterion(ABC):
    """Scores the units of a calibration's blocks; made anew for every scoring.

    Scores are non-negative, higher is more important. In a process group each rank takes whole accumulations,
    and every rank gets the same bits.

    Args:
        calibration: model, blocks and batches.
        options: what shapes the scores.
    """

    needs_data: ClassVar[bool] = True
    """Whether it reads calibration batches."""
    goes_by_layer: ClassVar[bool] = False
    """Whether it needs one decoder layer in memory at a time, not the whole model."""
    runs_held: ClassVar[bool] = False
    """Whether it runs the whole model so that each layer is held only while it runs, and again in the backward pass."""
    uses: ClassVar[tuple[str, ...]] = ()
    """Names of the options that shape it."""

    def __init__(self, calibration: Calibration, options: ScoringOptions) -> None:
        self.calibration = calibration
        self.options = options

    @abstractmethod
    def score(self) -> Scores:
        """Score every unit; the model is left as it was.

        Raises:
            ValueError: if a loss or an activation is NaN or infinite, with its place.
        """
