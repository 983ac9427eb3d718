"""Measure damage: the KL divergence from the dense model when units are gated. `optimal` and swaps use it.

Units are gated, not cut, so the model does not change. Axes in tensor names: B samples, T tokens, D hidden width,
V vocabulary, G groups, U units.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from gqaprune.common.precision import multiply_exactly, to_double
from gqaprune.models.architecture import Block
from gqaprune.models.gates import Gates, apply_gates
from gqaprune.models.layerwise import record_layer_inputs, resume_at
from gqaprune.plan import BlockKey
from gqaprune.scoring.averages import average_over_batches
from gqaprune.scoring.scores import Scores


class _GatedBlock(NamedTuple):
    """A block and the number of its units that are gated, in each of its groups."""

    key: BlockKey
    removed: int

    def __str__(self) -> str:
        return f"{self.key} without {self.removed} units"


@multiply_exactly()
def measure_damage_curves(
    model: PreTrainedModel,
    blocks: Sequence[Block],
    scores: Scores,
    levels: Mapping[BlockKey, Sequence[int]],
    batches: Sequence[Tensor],
) -> dict[BlockKey, list[tuple[int, float]]]:
    """Measure the damage of removing the weakest units of one block at a time.

    The decoder runs once per level, from the block's layer on. Memory holds the log-probabilities of one batch.

    Args:
        model: the dense causal LM.
        blocks: blocks to measure.
        scores: score of every unit.
        levels: numbers of units to remove from each block, or from each of its groups if it has several.
        batches: token ids, each `[batch, tokens]`, the same list on every rank.

    Returns:
        For each block, pairs of units removed and KL(dense ‖ gated) in nats per token.

    Raises:
        ValueError: if a divergence is not finite, naming the block and the batch.
    """
    points = [_GatedBlock(block.key, removed) for block in blocks for removed in levels[block.key]]

    def measure(batch_BT: Tensor) -> dict[_GatedBlock, float]:
        inputs_BTD = record_layer_inputs(model, batch_BT)
        dense_BTV = _predict(model, batch_BT)
        damages = {}
        for point in points:
            layer = point.key.layer
            gates_BU = make_gates(blocks, scores, {point.key: point.removed}, batch_BT.device)
            with resume_at(model, layer, inputs_BTD[layer]), apply_gates(blocks, gates_BU):
                damages[point] = _compute_divergence(dense_BTV, _predict(model, batch_BT))
        return damages

    means = average_over_batches(model, batches, points, measure, "damage curves")
    return {
        block.key: [(removed, means[_GatedBlock(block.key, removed)]) for removed in levels[block.key]]
        for block in blocks
    }


@multiply_exactly()
def measure_damage(
    model: PreTrainedModel,
    blocks: Sequence[Block],
    scores: Scores,
    removed: Mapping[BlockKey, int],
    batches: Sequence[Tensor],
) -> float:
    """Measure KL(dense ‖ gated), in nats per token, with the weakest units of all blocks gated at once.

    Args:
        model: the dense causal LM.
        blocks: blocks that `removed` names.
        scores: score of every unit.
        removed: number of units to remove from each block, or from each of its groups if it has several.
        batches: token ids, each `[batch, tokens]`, the same list on every rank.

    Raises:
        ValueError: if the divergence is not finite, naming the batch.
    """

    def measure(batch_BT: Tensor) -> dict[str, float]:
        dense_BTV = _predict(model, batch_BT)
        with apply_gates(blocks, make_gates(blocks, scores, removed, batch_BT.device)):
            return {"the gated model": _compute_divergence(dense_BTV, _predict(model, batch_BT))}

    return average_over_batches(model, batches, ["the gated model"], measure, "")["the gated model"]


def make_gates(blocks: Sequence[Block], scores: Scores, removed: Mapping[BlockKey, int], device: torch.device) -> Gates:
    """Make gates that are 0 for the weakest units of each block and 1 for the others.

    Of units with equal scores, the later one is weaker.

    Args:
        blocks: blocks that `removed` names.
        scores: score of every unit.
        removed: number of units to remove from each of a block's groups.
        device: device of the gates.

    Returns:
        Gates of the blocks that `removed` names, each `[1, units]`.
    """
    gates_BU = {}
    for block in blocks:
        if block.key in removed:
            score_GU = scores[block.key].reshape(block.groups, -1)
            order_GU = torch.argsort(score_GU, dim=1, descending=True, stable=True)
            gate_GU = torch.ones_like(score_GU, dtype=torch.float32)
            gate_GU.scatter_(1, order_GU[:, order_GU.shape[1] - removed[block.key] :], 0.0)
            gates_BU[block.key] = gate_GU.reshape(1, -1).to(device)
    return gates_BU


def _predict(model: PreTrainedModel, batch_BT: Tensor) -> Tensor:
    """Compute log-probabilities of the next token, float32 `[batch, tokens, vocabulary]`."""
    return functional.log_softmax(model(input_ids=batch_BT, use_cache=False).logits.float(), dim=-1)


def _compute_divergence(dense_BTV: Tensor, gated_BTV: Tensor) -> float:
    """Compute KL(dense ‖ gated) of log-probabilities in nats, mean over tokens."""
    return float(to_double(functional.kl_div(gated_BTV, dense_BTV, log_target=True, reduction="none").sum(-1)).mean())
