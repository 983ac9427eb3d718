"""Measure damage after repair: the divergence that removing units of one block causes after a least-squares refit.

It is `KL(dense ‖ the block without these units, its other units refitted)`, in nats per token of held-out text, with
the rest of the model unchanged. So attention and MLPs have the same unit, and damage that repair can undo does not
count. Units of attention are removed in the order in which the error of the refitted block grows least. Damage is
measured at two numbers of removed units; for other numbers it is a power law through them.

Calibration text runs through the decoder once, with one layer in memory at a time. So does a copy of some held-out text
for each block and number; copies are kept in the host's memory. The model is not changed.

Axes in tensor names: B samples, T tokens, N tokens of all samples, D hidden width, C columns of an output projection,
U units.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gqaprune.common.console import track
from gqaprune.common.distributed import copy_from_first_rank, get_rank_and_world_size
from gqaprune.common.precision import multiply_exactly
from gqaprune.models.architecture import Block, get_layers
from gqaprune.models.divergence import measure_divergences
from gqaprune.models.families import get_family
from gqaprune.models.gates import freeze_parameters
from gqaprune.models.layerwise import Stream, embed_batches, run_copy, run_layer, watch_inputs
from gqaprune.placement.layer_store import find_store
from gqaprune.plan import BlockKey, BlockKind
from gqaprune.scoring.criteria.base import Scores
from gqaprune.surgery.gram import Gram, Memory
from gqaprune.surgery.removal import remove_one_by_one, remove_weakest

FITTED_TOKENS = 16_384
"""Largest number of calibration tokens for least squares here; repair uses all."""
JUDGED_TOKENS = 2_048
"""Held-out tokens that damage is measured on at most: each copy of them passes all layers after its block."""
JUDGED_SHARE = 1 / 16
"""The same as a share of all calibration tokens, so that curves of a short text cost about as much as scores."""
JUDGED_PIECE = 512
"""Tokens of a piece that one rank measures."""
_LEVELS: Mapping[BlockKind, Sequence[float]] = {"attention": (0.25, 0.5), "mlp": (0.5,)}
"""Shares of a block's units at whose removal damage is measured."""
_EXPONENTS = (1.0, 3.0)
"""Smallest and largest exponent of the power law."""
_EXPONENT: Mapping[BlockKind, float] = {"attention": 2.0, "mlp": 1.25}
"""Exponent where damage is measured at a single number. Between a quarter and half of the channels, the MLPs of
SmolLM2-135M have exponents of 0.98 to 1.44, 1.26 in the mean."""
_NOISE = 1e-6
"""Damage below this, in nats per token, is noise."""


class Cut(NamedTuple):
    """A block and the number of units that it loses from each of its groups."""

    key: BlockKey
    removed: int

    def __str__(self) -> str:
        return f"{self.key} without {self.removed} units"


@dataclass(frozen=True)
class RepairedDamage:
    """Damage of each block, and the order in which attention loses its units.

    Args:
        points: damage of each measured cut, in nats per token.
        scores: scores of attention blocks, float64 `[units]`; units that are removed earlier have lower scores.
    """

    points: dict[Cut, float]
    scores: Scores


def choose_levels(kind: BlockKind, units: int, most: int) -> list[int]:
    """Choose the numbers of removed units at which a block is measured.

    Args:
        kind: the block's.
        units: units in each of the block's groups.
        most: largest number of units that may be removed from each group.
    """
    return sorted({max(1, min(most, round(share * units))) for share in _LEVELS[kind]}) if most else []


Points = list[tuple[int, float]]
"""Pairs of units removed and damage for one or two cuts of a block, ascending; empty if none was measured."""


def predict_damage(kind: BlockKind, points: Points, removed: float) -> float:
    """Predict the damage of removing a number of units from a block, in nats per token, by a power law.

    Args:
        kind: the block's.
        points: what was measured of it, which the law goes through.
        removed: number of units.
    """
    if not points or not removed:
        return 0.0
    (few, low), (many, high) = points[0], points[-1]
    low, high = max(low, _NOISE), max(high, _NOISE)
    power = math.log(high / low) / math.log(many / few) if many > few else _EXPONENT[kind]
    # If the exponent is clamped, the law is exact at the larger cut, where errors matter more.
    return float(high * (removed / many) ** min(max(power, _EXPONENTS[0]), _EXPONENTS[1]))


def draw_curves(points: Mapping[BlockKey, Points], most: Mapping[BlockKey, int]) -> dict[BlockKey, list[float]]:
    """Compute the damage of removing 0, 1, … units of each block, for allocations to compare.

    Attention loses units in few layers, so the predicted damage is used. Channels are removed from every layer, and
    removing them together does more damage than the sum of their parts. To spread them, each MLP's damage is moved
    halfway, on a logarithmic scale, to the mean of all MLPs, and grows with the square of the number of channels.

    Args:
        points: measured points of each block.
        most: largest number of units that may be removed from each block.

    Returns:
        For each block, damage in nats per token at 0 to `most` removed units.
    """
    largest = [measured[-1][1] for key, measured in points.items() if measured and key.kind == "mlp"]
    logs = [math.log(max(damage, _NOISE)) for damage in largest]
    mean = sum(logs) / max(1, len(logs))
    curves = {}
    for key, measured in points.items():
        numbers = range(most[key] + 1)
        if key.kind == "mlp" and measured:
            many, high = measured[-1]
            damage = math.exp((math.log(max(high, _NOISE)) + mean) / 2)
            curves[key] = [damage * (removed / many) ** 2 for removed in numbers]
        else:
            curves[key] = [predict_damage(key.kind, measured, removed) for removed in numbers]
    return curves


@multiply_exactly()
def measure_repaired_damage(
    model: PreTrainedModel,
    blocks: Sequence[Block],
    scores: Scores,
    protected: Mapping[BlockKey, set[int]],
    levels: Mapping[BlockKey, Sequence[int]],
    batches: Sequence[Tensor],
    held_out: set[int],
    *,
    refits: bool = True,
) -> RepairedDamage:
    """Measure the damage after repair of removing units of one block at a time.

    Args:
        model: the causal LM, which is not changed.
        blocks: blocks to measure.
        scores: score of every unit; channels with the lowest scores are removed first.
        protected: units to remove last, by block.
        levels: numbers of units to remove from each of a block's groups, ascending.
        batches: calibration token ids, each `[batch, tokens]`, the same list on every rank. Of those to fit on and of
            the held-out ones, only the first are read.
        held_out: indexes of the batches to judge on.
        refits: whether the kept columns are refitted by least squares. If not, damage is that of the cut alone.

    Raises:
        ValueError: if an activation or a divergence is not finite, naming the block.
    """
    judged = choose_judged(batches, held_out)
    fitted = _take_tokens([batch for i, batch in enumerate(batches) if i not in held_out] or batches, FITTED_TOKENS)
    rank, world_size = get_rank_and_world_size()
    measured: dict[int, list[Block]] = {}
    for block in blocks:
        if levels[block.key]:
            measured.setdefault(block.key.layer, []).append(block)
    order: dict[BlockKey, list[int]] = {}
    copies: dict[Cut, list[Tensor]] = {}
    with freeze_parameters(model), torch.no_grad():
        streams, dense = (embed_batches(model, text[rank::world_size]) for text in (fitted, judged))
        layers = track(range(len(get_layers(model))), "damage after repair", "layers")
        for layer in find_store(model).hold_each(layers):
            for hidden in copies.values():
                for index, stream in enumerate(dense):
                    hidden[index] = run_copy(model, layer, stream, hidden[index])
            layer_blocks = measured.get(layer, [])
            fit_streams = streams if layer <= max(measured, default=-1) else ()
            grams, outputs_BTD = _measure_grams(model, layer, layer_blocks, scores, fit_streams)
            _advance(fit_streams, outputs_BTD)
            attention = [block for block in layer_blocks if block.key.kind == "attention"]
            judged_grams, outputs_BTD = _measure_grams(model, layer, attention, scores, dense)
            for block in layer_blocks:
                errors_DC = _predict_errors(block, grams, judged_grams, scores, protected, levels, order, refits)
                for removed, error_DC in zip(levels[block.key], errors_DC, strict=True):
                    copies[Cut(block.key, removed)] = _run_with_error(model, block, error_DC, dense)
            _advance(dense, outputs_BTD)
        points = measure_divergences(model, dense, copies)
    return RepairedDamage(
        points, {block.key: _score_order(block, order[block.key]) for block in blocks if block.key in order}
    )


def choose_judged(batches: Sequence[Tensor], held_out: set[int]) -> list[Tensor]:
    """Return the text that damage is measured on: the first held-out windows, or the first of all if none is held out.

    Args:
        batches: calibration token ids, each `[batch, tokens]`.
        held_out: indexes of the batches that are held out.

    Returns:
        Token ids in small pieces that ranks can share, each `[windows, tokens]`; at least one.
    """
    held = [batches[index] for index in sorted(held_out)] or batches
    pieces = [piece for batch in held for piece in batch.split(max(1, JUDGED_PIECE // batch.shape[1]))]
    return _take_tokens(pieces, min(JUDGED_TOKENS, int(JUDGED_SHARE * sum(batch.numel() for batch in batches))))


def _take_tokens(batches: Sequence[Tensor], most: int) -> list[Tensor]:
    """Return the first batches that have at most so many tokens together, at least one."""
    taken, tokens = list[Tensor](), 0
    for batch in batches:
        tokens += batch.numel()
        if taken and tokens > most:
            break
        taken.append(batch)
    return taken


def _order_channels(block: Block, score_U: Tensor) -> Tensor:
    """Order channels from most to least important; of equal ones, the first comes first."""
    return torch.argsort(score_U, descending=True, stable=True).to(block.output.weight.device)


def _measure_grams(
    model: PreTrainedModel,
    layer: int,
    blocks: Sequence[Block],
    scores: Scores,
    streams: Sequence[Stream],
) -> tuple[dict[BlockKey, Gram], list[Tensor]]:
    """Run streams through a layer and measure Gram matrices of the inputs of its blocks' output projections.

    Channels are ordered by importance. If the model normalises a block's output, tokens count by relative error.

    Args:
        model: the causal LM.
        layer: the layer to run.
        blocks: blocks of this layer to measure.
        scores: scores of all units.
        streams: this rank's streams, at the layer's input.

    Returns:
        The Gram matrices, summed over all ranks, and the layer's output for each stream, `[B, T, D]`.

    Raises:
        ValueError: if a Gram matrix is not finite, naming the block.
    """
    memory, norms = Memory(next(model.parameters()).device), get_family(model.config).output_norms
    grams = {block.key: Gram(block.output.in_features, memory) for block in blocks}
    outputs = {block.key: block.output for block in blocks}
    orders = {block.key: _order_channels(block, scores[block.key]) for block in blocks if block.key.kind == "mlp"}

    def add(key: BlockKey, x_NC: Tensor) -> None:
        x_NC = x_NC.float()
        if key.kind in norms:
            output_ND = nn.functional.linear(x_NC, outputs[key].weight.float())
            x_NC = x_NC / output_ND.norm(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        grams[key].add(x_NC[:, orders[key]] if key in orders else x_NC)

    with watch_inputs(outputs, add):
        outputs_BTD = [run_layer(model, layer, stream) for stream in streams]
    for key, gram in grams.items():
        gram.sum_across_ranks()
        if not gram.is_finite():
            raise ValueError(
                f"{key}: the input of its output projection is not finite on the calibration text: activations "
                "overflow; load the model with dtype bfloat16 or float32"
            )
    return grams, outputs_BTD


def _advance(streams: Sequence[Stream], outputs_BTD: Sequence[Tensor]) -> None:
    for stream, output_BTD in zip(streams, outputs_BTD, strict=True):
        stream.hidden_BTD = output_BTD


def _predict_errors(
    block: Block,
    grams: Mapping[BlockKey, Gram],
    judged: Mapping[BlockKey, Gram],
    scores: Scores,
    protected: Mapping[BlockKey, set[int]],
    levels: Mapping[BlockKey, Sequence[int]],
    order: dict[BlockKey, list[int]],
    refits: bool,
) -> list[Tensor]:
    """Compute the error matrix E of each level, `[D, C]`; for attention, also add the order of its units to `order`."""
    key = block.key
    if key.kind == "mlp":
        return remove_weakest(block, grams[key], _order_channels(block, scores[key]), levels[key], refits=refits)
    outliers = protected.get(key, set())
    errors_DC, removal_order = remove_one_by_one(block, grams[key], judged[key], outliers, levels[key], refits=refits)
    order_U = torch.tensor(removal_order, device=block.output.weight.device)
    copy_from_first_rank(order_U)
    order[key] = order_U.tolist()
    return errors_DC


def _run_with_error(model: PreTrainedModel, block: Block, error_DC: Tensor, streams: Sequence[Stream]) -> list[Tensor]:
    """Run the block's layer on streams with `W − E` as the block's output projection; return outputs on the CPU."""

    def subtract_error(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output - nn.functional.linear(inputs[0], error_DC)

    handle = block.output.register_forward_hook(subtract_error)
    try:
        return [run_layer(model, block.key.layer, stream).cpu() for stream in streams]
    finally:
        handle.remove()


def _score_order(block: Block, order: Sequence[int]) -> Tensor:
    """Make scores that remove a block's units in `order`, one unit of every group at a time."""
    score_U = torch.zeros(block.units, dtype=torch.float64)
    for number, unit in enumerate(order):
        score_U[unit] = number // block.groups + 1
    return score_U
