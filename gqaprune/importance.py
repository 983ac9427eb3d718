"""Importance: criteria turn gate gradients of calibration batches into one score per unit.

Every criterion is a member of `CRITERIA`. Scores are non-negative, higher is more important, and comparable across
blocks of one model. Axes in tensor names: B samples, U units.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from gqaprune.architecture import Block, BlockKey, name_parameter_place, named_floating_parameters
from gqaprune.distributed import get_rank_and_world_size, is_true_anywhere, sum_across_ranks
from gqaprune.gates import Gates, compute_gate_gradients, freeze_parameters
from gqaprune.progress import track

Scores = dict[BlockKey, Tensor]
"""Score of every unit of every block, float64 `[units]` on the CPU."""


class GateCriterion(ABC):
    """Accumulates gate gradients into scores, in float64.

    Micro-batches arrive through `add`; `end_window` closes an accumulation window, the micro-batches whose gradients
    an optimizer step would have seen together.
    """

    def __init__(self, blocks: Sequence[Block], device: torch.device) -> None:
        self.sums_U = {block.key: torch.zeros(block.units, dtype=torch.float64, device=device) for block in blocks}

    @abstractmethod
    def add(self, gradients_BU: Gates) -> None:
        """Take the gate gradients of one micro-batch."""

    def end_window(self) -> None:  # noqa: B027  (most criteria have nothing to do here)
        """Close an accumulation window."""


class GateFisher(GateCriterion):
    """`Σ_n g_n²` over samples n: the diagonal Fisher information of the gate.

    Unit: (nats per token)², summed over samples. Source: the masks' Fisher information of Kwon et al. 2022,
    arXiv 2204.09656.
    """

    def add(self, gradients_BU: Gates) -> None:
        """Add every sample's squared gradient."""
        for key, gradient_BU in gradients_BU.items():
            self.sums_U[key] += gradient_BU.double().square().sum(0)


class GateTaylor(GateCriterion):
    """`Σ_w |Σ_{n∈w} g_n|` over accumulation windows w of samples n: the first-order Taylor term.

    Unit: nats per token, summed over samples. The absolute value is taken per window, so a longer window lets samples
    cancel, as they do in a training step. Source: Molchanov et al. 2019, arXiv 1906.10771; for LLMs, LLM-Pruner's
    "vectorized" Taylor, arXiv 2305.11627.
    """

    def __init__(self, blocks: Sequence[Block], device: torch.device) -> None:
        super().__init__(blocks, device)
        self.window_U = {key: torch.zeros_like(total) for key, total in self.sums_U.items()}

    def add(self, gradients_BU: Gates) -> None:
        """Add the micro-batch to the window."""
        for key, gradient_BU in gradients_BU.items():
            self.window_U[key] += gradient_BU.double().sum(0)

    def end_window(self) -> None:
        """Add the window's absolute gradient and start a new window."""
        for key, window_U in self.window_U.items():
            self.sums_U[key] += window_U.abs()
            window_U.zero_()


CRITERIA: Mapping[str, type[GateCriterion]] = {"fisher": GateFisher, "taylor": GateTaylor}
"""Name -> criterion."""


def score_units(
    model: PreTrainedModel, blocks: Sequence[Block], batches: Sequence[Tensor], criterion: str, accumulate: int = 1
) -> Scores:
    """Score the units of blocks on calibration batches.

    In a process group each rank takes whole accumulation windows and the sums are reduced once, so that the scores are
    those of one process on the same batches.

    Args:
        model: the dense causal LM.
        blocks: blocks to score.
        batches: token ids, each `[batch, tokens]`, the same list on every rank.
        criterion: a name in `CRITERIA`.
        accumulate: micro-batches per accumulation window.

    Raises:
        ValueError: if a loss or a score is NaN or infinite, with its place.
    """
    device = next(model.parameters()).device
    totals = CRITERIA[criterion](blocks, device)
    rank, world_size = get_rank_and_world_size()
    windows = math.ceil(len(batches) / accumulate)
    own = [
        index
        for window in range(rank, windows, world_size)
        for index in range(window * accumulate, min((window + 1) * accumulate, len(batches)))
    ]
    overflow = ""
    with freeze_parameters(model):
        for index in track(own, f"calibration: {criterion}", "batches"):
            gradients_BU, losses_B = compute_gate_gradients(model, blocks, batches[index].to(device))
            if not torch.isfinite(losses_B).all():
                overflow = f"batch {index}"
                break
            totals.add(gradients_BU)
            if (index + 1) % accumulate == 0 or index + 1 == len(batches):
                totals.end_window()
    if is_true_anywhere(bool(overflow), device):
        raise ValueError(
            f"the loss of calibration {overflow or 'text on another rank'} is not finite: the model's activations "
            f"overflow (it computes in {model.dtype}); load it with dtype bfloat16 or float32"
        )
    scores = {key: total.cpu() for key, total in sum_across_ranks(totals.sums_U).items()}
    check_finite_scores(scores)
    return scores


def check_finite_scores(scores: Scores) -> None:
    """Refuse scores that would make the choice of units arbitrary.

    Raises:
        ValueError: naming the first block with a NaN or infinite score.
    """
    for key, score_U in scores.items():
        bad = (~torch.isfinite(score_U)).nonzero().flatten().tolist()
        if bad:
            raise ValueError(
                f"{key}: {len(bad)} of {len(score_U)} scores are NaN or infinite (first: unit {bad[0]}); "
                "load the model with dtype bfloat16 or float32"
            )


def check_finite_weights(model: PreTrainedModel) -> None:
    """Refuse a model whose weights hold NaN or inf.

    Raises:
        ValueError: naming the first such parameter and its layer.
    """
    for name, parameter in named_floating_parameters(model):
        if not torch.isfinite(parameter).all():
            raise ValueError(
                f"weights of {name_parameter_place(name)} hold NaN or inf: the checkpoint is broken or was saved in "
                "a type too narrow for it; load it again in bfloat16 or float32"
            )
