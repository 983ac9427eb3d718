"""Find outliers during calibration: units that produce massive activations, without which models break.

A few channels of a few MLPs write values thousands of times larger than all others to single tokens, mostly the first,
and later layers depend on them (Sun et al. 2024, "Massive activations in large language models", arXiv 2402.17762; Yu
et al. 2024, "The super weight", arXiv 2411.07191). They occur at few tokens, so a criterion that averages over all
tokens may miss them.

Axes in tensor names: N tokens, C input columns of the output projection, U units, R ranks.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from gqaprune.common.distributed import get_rank_and_world_size, sum_across_ranks
from gqaprune.common.precision import multiply_exactly, to_double
from gqaprune.data.calibration import CalibrationSet
from gqaprune.models.architecture import Block
from gqaprune.plan import BlockKey
from gqaprune.scoring.criteria.activations import ActivationCriterion
from gqaprune.scoring.criteria.base import Scores, ScoringConfig, ScoringRun
from gqaprune.surgery.gram import Memory

Outliers = Mapping[BlockKey, Mapping[int, float]]
"""Block -> unit -> its largest output relative to the median unit's; blocks without outliers are left out."""

OUTLIER_RATIO = 20.0
"""A unit is an outlier if its largest output is at least this many times that of the block's median unit.

On SmolLM2-135M and the embedded text, the largest ratio of most blocks is between 1 and 14. Eight MLPs have one to four
units above 20; the largest ratio is 2,700."""
LOOKED_AT = 8192
"""Tokens that are searched. Massive activations occur at the first token of every window."""


class LargestOutput(ActivationCriterion[Tensor]):
    """A unit's largest output on any token, relative to that of its block's median unit.

    The output of a column is its input times the norm of its weights; that of a unit is the largest of its columns'.
    The statistics are the largest absolute inputs, `[R, C]`; each rank fills its row.
    """

    def start(self, block: Block, memory: Memory) -> Tensor:
        """Return zeros."""
        _, world_size = get_rank_and_world_size()
        return torch.zeros(world_size, block.output.in_features, device=self.run.device)

    def add(self, statistics: Tensor, x_NC: Tensor) -> None:
        """Update this rank's maxima."""
        largest_C = statistics[get_rank_and_world_size()[0]]
        torch.maximum(largest_C, x_NC.abs().amax(0), out=largest_C)

    def add_ranks(self, statistics: Tensor) -> bool:
        """Share the rows of all ranks."""
        statistics.copy_(sum_across_ranks({"largest": statistics})["largest"])
        return bool(statistics.isfinite().all())

    def rate(self, block: Block, statistics: Tensor) -> Tensor:
        """Divide largest outputs by their median; return zeros if that is 0."""
        output_C = to_double(statistics.amax(0)) * to_double(block.output.weight).norm(dim=0)
        output_U = output_C.view(block.units, -1).amax(1)
        median = output_U.median()
        return output_U / median if median else torch.zeros_like(output_U)


def find_outliers(
    model: PreTrainedModel, blocks: Sequence[Block], calibration: CalibrationSet | Sequence[Tensor]
) -> Outliers:
    """Find units whose largest output on any token is at least `OUTLIER_RATIO` times that of their block's median unit.

    Args:
        model: the causal LM, which is not changed.
        blocks: blocks to search.
        calibration: the text or only its batches, the same on every rank; the first `LOOKED_AT` tokens are read.

    Returns:
        Block -> unit -> ratio, the same on every rank.

    Raises:
        ValueError: if an activation is not finite, naming the block.
    """
    return list_outliers(prepare_search(model, blocks, calibration))


def prepare_search(
    model: PreTrainedModel, blocks: Sequence[Block], calibration: CalibrationSet | Sequence[Tensor]
) -> LargestOutput:
    """Prepare a search for `list_outliers`. Before that, it can watch the forward pass of another criterion."""
    calibration = CalibrationSet.wrap(calibration)
    text = replace(calibration, batches=_take_tokens(calibration.batches))
    return LargestOutput(ScoringRun(model, blocks, text, name="outliers"), ScoringConfig())


@multiply_exactly()
def list_outliers(largest: LargestOutput) -> Outliers:
    """List the outliers of a search; runs a forward pass unless the search has watched one."""
    outliers = {
        key: {unit: ratio for unit, ratio in enumerate(ratio_U.tolist()) if ratio >= OUTLIER_RATIO}
        for key, ratio_U in largest.score().items()
    }
    return {key: units for key, units in outliers.items() if units}


def protect_units(scores: Scores, outliers: Outliers) -> Scores:
    """Return scores in which each outlier counts more than all other units together, so that it is removed last."""
    total = sum(float(score_U.sum()) for score_U in scores.values()) or 1.0
    protected = {}
    for key, score_U in scores.items():
        protected[key] = score_U.clone()
        protected[key][list(outliers.get(key, ()))] += total
    return protected


def _take_tokens(batches: Sequence[Tensor]) -> list[Tensor]:
    """Take the first batches, until they have `LOOKED_AT` tokens together."""
    taken, tokens = [], 0
    for batch_BT in batches:
        taken.append(batch_BT)
        tokens += batch_BT.numel()
        if tokens >= LOOKED_AT:
            break
    return taken
