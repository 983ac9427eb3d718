"""The interface of a criterion, which scores units on a calibration set, and the settings of scoring."""

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
"""Name -> reduction of a unit's members (its rows of each input projection, its output columns) to one score,
`[members, units]` -> `[units]`. LLM-Pruner's `grouping_strategy`."""

NORMALIZATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "none": torch.ones_like,
    "mean": lambda score_U: score_U.mean(),
    "sum": lambda score_U: score_U.sum(),
    "max": lambda score_U: score_U.max(),
}
"""Name -> divisor of each block's scores, applied before blocks are compared."""

PIECE_TOKENS = 1024
"""Tokens per forward: samples are independent, so a micro-batch can be cut into pieces of whole samples."""


def cut_pieces(input_ids: Tensor) -> Sequence[Tensor]:
    """Cut a micro-batch, `[batch, tokens]`, into pieces that all criteria run, so that they see the same bits."""
    pieces: Sequence[Tensor] = input_ids.split(max(1, PIECE_TOKENS // input_ids.shape[1]))
    return pieces


@dataclass(frozen=True)
class ScoringConfig:
    """Settings of scoring besides the criterion.

    Args:
        reduction: how the members of a unit (rows and columns of its weights) are reduced to one score: `sum`, `mean`,
            `max` or `prod`. Ignored by criteria that read gates or activations.
        normalization: divisor of each block's scores before blocks are compared: `none`, or the scores' `mean`, `sum`
            or `max`. With a single criterion it has no effect if the allocation does not compare blocks (`uniform`).
        obs_ridge: ridge of the criterion `obs`, as a multiple of the mean squared input; above 0. Ignored by others.
        protect_outliers: remove units with massive activations last, whatever their scores: units whose largest output
            on the calibration text is 20 times that of their block's median unit. Without text nothing is protected.

    Raises:
        ValueError: if a setting is out of bounds.
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
            raise ValueError(f"obs_ridge must be above 0 and finite, got {self.obs_ridge}; try 0.1")


@dataclass(frozen=True)
class ScoringRun:
    """The model, blocks and text that a criterion scores.

    Args:
        model: the dense causal LM.
        blocks: blocks to score.
        calibration: the text, and how its micro-batches accumulate.
        name: text of the progress bar.
    """

    model: PreTrainedModel
    blocks: Sequence[Block]
    calibration: CalibrationSet
    name: str = "calibration"

    @property
    def device(self) -> torch.device:
        """The model's device."""
        device: torch.device = next(self.model.parameters()).device
        return device


class Criterion(ABC):
    """Scores the units of a run's blocks. Create a new instance for each scoring.

    Scores are non-negative; higher means more important. In a process group each rank takes whole accumulations, and
    every rank gets the same bits.

    Args:
        run: model, blocks and calibration text.
        scoring: further settings of the scores.
    """

    needs_data: ClassVar[bool] = True
    """Whether it reads calibration batches."""
    goes_by_layer: ClassVar[bool] = False
    """Whether it needs only one decoder layer in memory at a time."""
    runs_held: ClassVar[bool] = False
    """Whether it runs the whole model, but needs each layer in memory only while it runs forward and backward."""
    uses: ClassVar[tuple[str, ...]] = ()
    """Names of the settings of `ScoringConfig` that it depends on."""
    uses_seed: ClassVar[bool] = False
    """Whether its scores depend on the calibration set's seed."""

    def __init__(self, run: ScoringRun, scoring: ScoringConfig) -> None:
        self.run = run
        self.scoring = scoring

    @property
    def passes_tokens_once(self) -> bool:
        """Whether `score` runs each of this rank's tokens, in order, once through the blocks' output projections.

        Criteria that only need the inputs of these projections can then watch instead of running a pass themselves.
        """
        return False

    def count_kept_bytes(self) -> int:
        """Count the bytes of activations that the pass keeps on the device, which watching criteria must leave free."""
        return 0

    @abstractmethod
    def score(self) -> Scores:
        """Score every unit without changing the model.

        Raises:
            ValueError: if a loss or an activation is NaN or infinite, naming the batch or the block.
        """
