"""Outliers: units that carry massive activations, without which models break, found during calibration.

A few channels of a few MLPs write values thousands of times larger than all others onto single tokens, mostly the
first, and later layers read or take back just these (Sun et al. 2024, "Massive activations in large language models",
arXiv 2402.17762; Yu et al. 2024, "The super weight", arXiv 2411.07191). They are at few tokens, so that a criterion
that averages over all may miss them.

Axes in tensor names: N tokens, C input columns of the output projection, U units, R ranks.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from gqaprune.architecture import Block, BlockKey
from gqaprune.criteria.base import Scores
from gqaprune.distributed import get_rank_and_world_size, sum_across_ranks
from gqaprune.gates import freeze_parameters
from gqaprune.holding import hold_each
from gqaprune.layerwise import embed_batches, run_layer, watch_inputs
from gqaprune.progress import track

Outliers = Mapping[BlockKey, Mapping[int, float]]
"""Block -> unit -> its largest output relative to the median unit's; blocks without outliers are left out."""

OUTLIER_RATIO = 20.0
"""A unit's largest output relative to the median unit's, from which on it is an outlier.

On SmolLM2-135M and the embedded text the largest of most blocks is at 1 to 14; eight MLPs have one to four above 20, of
2,700 at most."""
_TOKENS = 8192
"""Tokens that are looked at; massive activations are at the first token of every window."""


@torch.no_grad()
def find_outliers(model: PreTrainedModel, blocks: Sequence[Block], batches: Sequence[Tensor]) -> Outliers:
    """Find the units whose largest output on any token is `OUTLIER_RATIO` times that of their block's median unit.

    A column's output is its input times the norm of its weights; a unit's is the largest of its columns'.

    Args:
        model: the causal LM; it is left as it was.
        blocks: blocks to look at.
        batches: calibration token ids, each `[batch, tokens]`, the same list on every rank; the first are read.

    Returns:
        The same on every rank.
    """
    blocks_of: dict[int, list[Block]] = {}
    for block in blocks:
        blocks_of.setdefault(block.key.layer, []).append(block)
    rank, world_size = get_rank_and_world_size()
    seen = _take_tokens(batches)
    own = [seen[index % len(seen)] for index in range(rank, max(len(seen), world_size), world_size)]
    found: dict[BlockKey, dict[int, float]] = {}
    with freeze_parameters(model):
        streams = embed_batches(model, own)
        for layer in hold_each(model, track(range(max(blocks_of, default=-1) + 1), "outliers", "layers")):
            own_blocks = blocks_of.get(layer, [])
            largest = {block.key: torch.zeros_like(block.output.weight[0], dtype=torch.float32) for block in own_blocks}

            def note(key: BlockKey, x_NC: Tensor, largest: dict[BlockKey, Tensor] = largest) -> None:
                largest[key] = torch.maximum(largest[key], x_NC.abs().amax(0).float())

            with watch_inputs({block.key: block.output for block in own_blocks}, note):
                for stream in streams:
                    stream.hidden_BTD = run_layer(model, layer, stream)
            for block in own_blocks:
                if outliers := _list_outliers(block, largest[block.key]):
                    found[block.key] = outliers
    return {block.key: found[block.key] for block in blocks if block.key in found}


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
        if tokens >= _TOKENS:
            break
    return taken


def _list_outliers(block: Block, largest_C: Tensor) -> dict[int, float]:
    """The outliers among a block's units, given the largest absolute input of each column on this rank's tokens."""
    rank, world_size = get_rank_and_world_size()
    largest_RC = torch.zeros(world_size, len(largest_C), dtype=torch.float64, device=largest_C.device)
    largest_RC[rank] = largest_C
    largest_C = sum_across_ranks({"largest": largest_RC})["largest"].amax(0)
    output_U = (largest_C * block.output.weight.double().norm(dim=0)).view(block.units, -1).amax(1)
    median = output_U.median()
    if median == 0:
        return {}
    ratio_U = output_U / median
    return {int(unit): float(ratio_U[unit]) for unit in (ratio_U >= OUTLIER_RATIO).nonzero().flatten()}
