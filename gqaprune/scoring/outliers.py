"""Outliers: units that carry massive activations, without which models break, found during calibration.

A few channels of a few MLPs write values thousands of times larger than all others onto single tokens, mostly the
first, and later layers read or take back just these (Sun et al. 2024, "Massive activations in large language models",
arXiv 2402.17762; Yu et al. 2024, "The super weight", arXiv 2411.07191). They are at few tokens, so that a criterion
that averages over all may miss them.

Axes in tensor names: N tokens, C input columns of the output projection, U units, R ranks.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from gqaprune.common.distributed import get_rank_and_world_size, sum_across_ranks
from gqaprune.common.precision import multiply_exactly
from gqaprune.data.calibration import CalibrationSet
from gqaprune.models.architecture import Block
from gqaprune.plan import BlockKey
from gqaprune.scoring.criteria.activations import ActivationCriterion
from gqaprune.scoring.criteria.base import Scores, ScoringConfig, ScoringRun
from gqaprune.surgery.gram import Memory

Outliers = Mapping[BlockKey, Mapping[int, float]]
"""Block -> unit -> its largest output relative to the median unit's; blocks without outliers are left out."""

OUTLIER_RATIO = 20.0
"""A unit's largest output relative to the median unit's, from which on it is an outlier.

On SmolLM2-135M and the embedded text the largest of most blocks is at 1 to 14; eight MLPs have one to four above 20, of
2,700 at most."""
LOOKED_AT = 8192
"""Tokens that are looked at; massive activations are at the first token of every window."""


class LargestOutput(ActivationCriterion[Tensor]):
    """A unit's largest output on any token, relative to that of its block's median unit.

    A column's output is its input times the norm of its weights; a unit's is the largest of its columns'. The
    statistics are the largest absolute inputs, `[R, C]` with each rank's own in its row.
    """

    def start(self, block: Block, memory: Memory) -> Tensor:
        """Zeros."""
        _, world_size = get_rank_and_world_size()
        return torch.zeros(world_size, block.output.in_features, device=memory.device)

    def add(self, statistics: Tensor, x_NC: Tensor) -> None:
        """The larger of both."""
        own_C = statistics[get_rank_and_world_size()[0]]
        torch.maximum(own_C, x_NC.abs().amax(0), out=own_C)

    def add_ranks(self, statistics: Tensor) -> bool:
        """Every rank's row to every rank."""
        statistics.copy_(sum_across_ranks({"largest": statistics})["largest"])
        return bool(statistics.isfinite().all())

    def rate(self, block: Block, statistics: Tensor) -> Tensor:
        """Largest outputs over their median; zeros where that is 0."""
        output_C = statistics.amax(0).double() * block.output.weight.double().norm(dim=0)
        output_U = output_C.view(block.units, -1).amax(1)
        median = output_U.median()
        return output_U / median if median else torch.zeros_like(output_U)


def find_outliers(
    model: PreTrainedModel, blocks: Sequence[Block], calibration: CalibrationSet | Sequence[Tensor]
) -> Outliers:
    """Find the units whose largest output on any token is `OUTLIER_RATIO` times that of their block's median unit.

    Args:
        model: the causal LM; it is left as it was.
        blocks: blocks to look at.
        calibration: the text, or its batches alone, the same on every rank; the first ones are read.

    Returns:
        The same on every rank.

    Raises:
        ValueError: if an activation is not finite, with its place.
    """
    return list_outliers(prepare_search(model, blocks, calibration))


def prepare_search(
    model: PreTrainedModel, blocks: Sequence[Block], calibration: CalibrationSet | Sequence[Tensor]
) -> LargestOutput:
    """What `list_outliers` lists them from; it may watch the pass of another criterion before."""
    calibration = CalibrationSet.wrap(calibration)
    text = replace(calibration, batches=_take_tokens(calibration.batches))
    return LargestOutput(ScoringRun(model, blocks, text, name="outliers"), ScoringConfig())


@multiply_exactly()
def list_outliers(largest: LargestOutput) -> Outliers:
    """The outliers among the units that were looked at; makes a pass if none was watched."""
    ratios = largest.score()
    found = {
        key: {unit: ratio for unit, ratio in enumerate(ratio_U.tolist()) if ratio >= OUTLIER_RATIO}
        for key, ratio_U in ratios.items()
    }
    return {key: units for key, units in found.items() if units}


def protect_units(scores: Scores, outliers: Outliers) -> Scores:
    """Scores in which an outlier counts for more than all other units of all blocks together, so that it goes last."""
    total = sum(float(score_U.sum()) for score_U in scores.values()) or 1.0
    protected = {}
    for key, score_U in scores.items():
        protected[key] = score_U.clone()
        protected[key][list(outliers.get(key, ()))] += total
    return protected


def _take_tokens(batches: Sequence[Tensor]) -> list[Tensor]:
    """The first batches that have so many tokens together."""
    taken, tokens = [], 0
    for batch_BT in batches:
        taken.append(batch_BT)
        tokens += batch_BT.numel()
        if tokens >= LOOKED_AT:
            break
    return taken
