"""What a criterion is: scores of units from a calibration set, and the settings that shape them."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from gqaprune.common.field_types import check_field_types
from gqaprune.data.calibration import CalibrationSet
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


PIECE_TOKENS = 1024
"""Tokens that are passed through the model at once: samples do not touch each other."""


def cut_pieces(input_ids: Tensor) -> Sequence[Tensor]:
    """A micro-batch, `[batch, tokens]`, in the pieces in which all criteria pass it, so that they see the same bits."""
    pieces: Sequence[Tensor] = input_ids.split(max(1, PIECE_TOKENS // input_ids.shape[1]))
    return pieces


@dataclass(frozen=True)
class ScoringConfig:
    """What shapes scores besides the criterion.

    Args:
        reduction: how the members of a unit (rows and columns of its weights) make one score: `sum`, `mean`, `max`,
            `prod`. Ignored by criteria that look at gates or activations.
        normalization: what the scores of each block are divided by before blocks are compared: `none`, or their own
            `mean`, `sum` or `max`. Alone it changes nothing where the allocation does not compare blocks (`uniform`).
        obs_ridge: ridge of the criterion `obs`, as a multiple of the mean squared input; above 0. Ignored by others.
        protect_outliers: units that carry massive activations (an output 20 times that of their block's median unit, on
            the calibration text) go last, whatever their scores; nothing is protected where no text is read.

    Raises:
        ValueError: if a setting is out of its bounds.
    """

    reduction: str = "sum"
    normalization: str = "none"
    obs_ridge: float = 0.1
    protect_outliers: bool = True

    def __post_init__(self) -> None:
        check_field_types(self)
        for name, members in (("reduction", REDUCTIONS), ("normalization", NORMALIZATIONS)):
            if getattr(self, name) not in members:
                raise ValueError(f"{name} must be one of {', '.join(members)}, got {getattr(self, name)!r}")
        if not 0 < self.obs_ridge < math.inf:
            raise ValueError(f"obs_ridge must be above 0 and finite, got {self.obs_ridge}; 0.1 works")


@dataclass(frozen=True)
class ScoringRun:
    """What a criterion works on.

    Args:
        model: the dense causal LM.
        blocks: blocks to score.
        calibration: the text, and how its micro-batches accumulate.
        name: what the progress bar says.
    """

    model: PreTrainedModel
    blocks: Sequence[Block]
    calibration: CalibrationSet
    name: str = "calibration"

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        device: torch.device = next(self.model.parameters()).device
        return device


class Criterion(ABC):
    """Scores the units of a run's blocks; made anew for every scoring.

    Scores are non-negative, higher is more important. In a process group each rank takes whole accumulations, and every
    rank gets the same bits.

    Args:
        run: model, blocks and calibration text.
        scoring: what shapes the scores.
    """

    needs_data: ClassVar[bool] = True
    """Whether it reads calibration batches."""
    goes_by_layer: ClassVar[bool] = False
    """Whether it needs one decoder layer in memory at a time, not the whole model."""
    runs_held: ClassVar[bool] = False
    """Whether it runs the whole model so that each layer is held only while it runs, and again in the backward pass."""
    uses: ClassVar[tuple[str, ...]] = ()
    """Names of the settings of `ScoringConfig` that shape it."""
    uses_seed: ClassVar[bool] = False
    """Whether its scores depend on the calibration set's seed."""

    def __init__(self, run: ScoringRun, scoring: ScoringConfig) -> None:
        self.run = run
        self.scoring = scoring

    @property
    def passes_tokens_once(self) -> bool:
        """Whether `score` runs each of this rank's tokens, in their order, once through the blocks' output projections.

        Criteria that need no more than the inputs of these may then watch instead of making a pass of their own.
        """
        return False

    def count_kept_bytes(self) -> int:
        """Bytes of activations that this pass keeps on the device at a time, which those who watch leave to it."""
        return 0

    @abstractmethod
    def score(self) -> Scores:
        """Score every unit; the model is left as it was.

        Raises:
            ValueError: if a loss or an activation is NaN or infinite, with its place.
        """
