"""Damage after repair: what removing units of one block costs once least squares have made up for what they can.

`KL(dense ‖ the block without these units, the others refitted)`, in nats per token of held-out text, with nothing
else changed. It is one currency for attention and MLP, and it sees what repair can and cannot make up for; units of
attention go in the order in which the error of the refitted block grows least. Measured at two numbers of removed
units, and a power of the number between and beyond.

The decoder is passed once, one layer in memory at a time, by calibration text and, for every block and number, by a
copy of some held-out text, which waits in the host's memory. No model is cut and none is rebuilt.

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
from gqaprune.common.distributed import get_rank_and_world_size, sum_across_ranks
from gqaprune.common.precision import multiply_exactly
from gqaprune.models.architecture import Block, get_layers
from gqaprune.models.divergence import measure_divergences
from gqaprune.models.families import get_family
from gqaprune.models.gates import freeze_parameters
from gqaprune.models.layerwise import Stream, embed_batches, run_copy, run_layer, watch_inputs
from gqaprune.placement.layer_store import find_store
from gqaprune.plan import BlockKey
from gqaprune.scoring.criteria.base import Scores
from gqaprune.surgery.gram import Gram, Memory
from gqaprune.surgery.removal import remove_one_by_one, remove_weakest

FITTED_TOKENS = 16_384
"""Calibration tokens that least squares see here at most; repair sees all."""
JUDGED_TOKENS = 2_048
"""Held-out tokens that damage is measured on at most: each copy of them passes all layers after its block."""
JUDGED_SHARE = 1 / 16
"""The same as a share of all calibration tokens, so that the curves of a short text cost no more than its scores."""
JUDGED_PIECE = 512
"""Tokens of a piece that one rank measures."""
_LEVELS = (0.25, 0.5)
"""Shares of a block's units that are removed where its damage is measured."""
_EXPONENTS = (1.0, 3.0)
"""Powers of the number of removed units that damage may grow with."""
_LEAST = 1e-6
"""Nats per token; what is measured below it is noise."""


class Cut(NamedTuple):
    """A block and how many units it loses from each of its groups."""

    key: BlockKey
    removed: int

    def __str__(self) -> str:
        return f"{self.key} without {self.removed} units"


@dataclass(frozen=True)
class RepairedDamage:
    """Damage of every block, and in which order attention loses its units.

    Args:
        points: damage of each cut that was measured, in nats per token.
        scores: of attention blocks, units that go earlier having lower ones, float64 `[units]`.
    """

    points: dict[Cut, float]
    scores: Scores


def choose_levels(units: int, most: int) -> list[int]:
    """Numbers of removed units at which a block is measured.

    Args:
        units: it has, in each of its groups.
        most: may go.
    """
    return sorted({max(1, min(most, round(share * units))) for share in _LEVELS}) if most else []


Points = list[tuple[int, float]]
"""Units removed and damage of one or two cuts of a block, ascending."""


def predict_damage(points: Points, removed: float) -> float:
    """Damage of removing a number of units, as a power of it through what was measured."""
    if not points or not removed:
        return 0.0
    (first, low), (last, high) = points[0], points[-1]
    low, high = max(low, _LEAST), max(high, _LEAST)
    power = math.log(high / low) / math.log(last / first) if last > first else sum(_EXPONENTS) / 2
    # Through the larger cut, which more is at stake in, where the power is not that of both.
    return float(high * (removed / last) ** min(max(power, _EXPONENTS[0]), _EXPONENTS[1]))


def draw_curves(points: Mapping[BlockKey, Points], most: Mapping[BlockKey, int]) -> dict[BlockKey, list[float]]:
    """Damage of removing 0, 1, … units of each block, as allocations compare it.

    Units of attention go from few layers: their damage is what is predicted. Channels go from every layer, and what
    goes together costs more than each by itself: MLPs are told apart half as much as they were measured to differ, on
    a logarithmic scale, and their damage grows with the square of the number, which spreads it.

    Args:
        points: of each block.
        most: units that may go.
    """
    logs = [math.log(max(own[-1][1], _LEAST)) for key, own in points.items() if own and key.kind == "mlp"]
    mean = sum(logs) / max(1, len(logs))
    curves = {}
    for key, own in points.items():
        numbers = range(most[key] + 1)
        if key.kind == "mlp" and own:
            last, high = own[-1]
            shared = math.exp((math.log(max(high, _LEAST)) + mean) / 2)
            curves[key] = [shared * (removed / last) ** 2 for removed in numbers]
        else:
            curves[key] = [predict_damage(own, removed) for removed in numbers]
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
    """Measure what removing units of one block at a time costs after repair.

    Args:
        model: the causal LM; it is left as it was.
        blocks: blocks to measure.
        scores: score of every unit; channels go from the lowest on.
        protected: units that go last, by block.
        levels: numbers of units to remove from each of a block's groups, ascending.
        batches: calibration token ids, each `[batch, tokens]`, the same list on every rank.
        held_out: indexes of the batches to judge on; the first batches on both sides are read.
        refits: whether least squares refit what is kept; else the damage is that of the cut.

    Raises:
        ValueError: if an activation or a divergence is not finite, with its place.
    """
    judged = choose_judged(batches, held_out)
    fitted = _take_tokens([batch for i, batch in enumerate(batches) if i not in held_out] or batches, FITTED_TOKENS)
    rank, world_size = get_rank_and_world_size()
    of_layer: dict[int, list[Block]] = {}
    for block in blocks:
        if levels[block.key]:
            of_layer.setdefault(block.key.layer, []).append(block)
    order: dict[BlockKey, list[int]] = {}
    copies: dict[Cut, list[Tensor]] = {}
    with freeze_parameters(model), torch.no_grad():
        streams, dense = (embed_batches(model, text[rank::world_size]) for text in (fitted, judged))
        layers = track(range(len(get_layers(model))), "damage after repair", "layers")
        for layer in find_store(model).hold_each(layers):
            for hidden in copies.values():
                for index, stream in enumerate(dense):
                    hidden[index] = run_copy(model, layer, stream, hidden[index])
            own = of_layer.get(layer, [])
            fit_streams = streams if layer <= max(of_layer, default=-1) else ()
            grams, outputs_BTD = _measure_grams(model, layer, own, scores, fit_streams)
            _move(fit_streams, outputs_BTD)
            attention = [block for block in own if block.key.kind == "attention"]
            judged_grams, outputs_BTD = _measure_grams(model, layer, attention, scores, dense)
            for block in own:
                lost = _find_lost(block, grams, judged_grams, scores, protected, levels, order, refits)
                for removed, loss_DC in zip(levels[block.key], lost, strict=True):
                    copies[Cut(block.key, removed)] = _run_without(model, block, loss_DC, dense)
            _move(dense, outputs_BTD)
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
    """The most important channel first; of equals the first."""
    return torch.argsort(score_U, descending=True, stable=True).to(block.output.weight.device)


def _measure_grams(
    model: PreTrainedModel,
    layer: int,
    blocks: Sequence[Block],
    scores: Scores,
    streams: Sequence[Stream],
) -> tuple[dict[BlockKey, Gram], list[Tensor]]:
    """Gram matrices of blocks' inputs on streams, all ranks', and what the layer makes of this rank's, `[B, T, D]`.

    Channels are in the order of their importance. Where a norm follows, every token counts by its relative error.

    Args:
        model: the causal LM.
        layer: the blocks'.
        blocks: some of the layer.
        scores: of all units.
        streams: this rank's.

    Raises:
        ValueError: if one is not finite, with the block.
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


def _move(streams: Sequence[Stream], outputs_BTD: Sequence[Tensor]) -> None:
    for stream, output_BTD in zip(streams, outputs_BTD, strict=True):
        stream.hidden_BTD = output_BTD


def _find_lost(
    block: Block,
    grams: Mapping[BlockKey, Gram],
    judged: Mapping[BlockKey, Gram],
    scores: Scores,
    protected: Mapping[BlockKey, set[int]],
    levels: Mapping[BlockKey, Sequence[int]],
    order: dict[BlockKey, list[int]],
    refits: bool,
) -> list[Tensor]:
    """What a block loses at each level, the same on every rank; of attention, note the order of its units."""
    key = block.key
    if key.kind == "mlp":
        return remove_weakest(block, grams[key], _order_channels(block, scores[key]), levels[key], refits=refits)
    lost, own = remove_one_by_one(block, grams[key], judged[key], protected.get(key, set()), levels[key], refits=refits)
    rank, _ = get_rank_and_world_size()
    first = torch.tensor(own, dtype=torch.float64, device=block.output.weight.device) * (rank == 0)
    order[key] = [int(unit) for unit in sum_across_ranks({key: first})[key].tolist()]
    return lost


def _run_without(model: PreTrainedModel, block: Block, loss_DC: Tensor, streams: Sequence[Stream]) -> list[Tensor]:
    """Output of the block's layer for each stream, in the host's memory, if the block loses something."""

    def lose(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output - nn.functional.linear(inputs[0], loss_DC)

    handle = block.output.register_forward_hook(lose)
    try:
        return [run_layer(model, block.key.layer, stream).cpu() for stream in streams]
    finally:
        handle.remove()


def _score_order(block: Block, order: Sequence[int]) -> Tensor:
    """Scores by which a block's units go in an order, those of several groups together."""
    score_U = torch.zeros(block.units, dtype=torch.float64)
    for number, unit in enumerate(order):
        score_U[unit] = number // block.groups + 1
    return score_U
