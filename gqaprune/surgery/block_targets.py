"""Measure what repair fits a block to: second moments of its inputs and of the difference from its target.

A block's target is its output before the cut, moved by `pull` towards the output that would restore the dense model's
hidden states. The fit is of the residual, target minus output of the cut block, on the kept inputs of the output
projection.

Axes in tensor names: B samples, T tokens, N tokens of all samples, D hidden width, R some rows of the output
projection, C its columns, S the fitted inputs: the kept columns and, at the end, a column of ones for the bias.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from gqaprune.common.distributed import add_across_ranks
from gqaprune.common.precision import sum_in_double, to_double
from gqaprune.models.architecture import Block, compute_addition, read_residual_multiplier
from gqaprune.models.families import get_family
from gqaprune.surgery.gram import Memory
from gqaprune.surgery.least_squares import Moments
from gqaprune.surgery.refinement import TokenPairs
from gqaprune.surgery.streams import BlockActivations

_ROWS = 1024
"""Rows of an output projection that are converted to float32 at a time."""


@dataclass(frozen=True)
class BlockMoments:
    """Moments of the fitted inputs and of the residuals of the cut block, summed over all ranks.

    Args:
        fit: moments on the batches to fit on.
        held_out: moments on the held-out batches; the same as `fit` if none was held out.
        energy: `Σ ‖target‖²` on the held-out batches.
    """

    fit: Moments
    held_out: Moments
    energy: float


def measure_moments(
    model: PreTrainedModel,
    block: Block,
    columns: Tensor,
    activations: Iterable[BlockActivations],
    memory: Memory,
    *,
    fits_weight: bool,
    fits_bias: bool,
    pull: float,
    tokens: tuple[TokenPairs, TokenPairs] | None,
) -> BlockMoments:
    """Sum the moments that a block's refit needs, before the block is cut.

    Args:
        model: the model, cut up to the block.
        block: the block, still dense.
        columns: columns of its output projection to keep.
        activations: activations of the block on this rank's batches.
        memory: where the moments are kept.
        fits_weight: whether the kept columns are inputs of the fit.
        fits_bias: whether a column of ones is an input of the fit.
        pull: how far targets move from the block's output towards the dense model's hidden states, 0 to 1. Ignored
            where these are unknown.
        tokens: buffers for this rank's inputs and targets, of the batches to fit on and of the held-out ones; None
            keeps neither.

    Raises:
        ValueError: if an input or a target is not finite, naming the block.
    """
    is_removed_C = torch.ones_like(block.output.weight[0], dtype=torch.bool)
    is_removed_C[columns] = False
    removed_DC = block.output.weight[:, is_removed_C].float()
    is_normed = block.key.kind in get_family(model.config).output_norms
    inputs = (len(columns) if fits_weight else 0) + fits_bias
    moments = [Moments(inputs, len(block.output.weight), memory) for _ in range(2)]
    energies = [torch.zeros_like(sums.energy) for sums in moments]
    tokens_seen = [0, 0]
    for batch in activations:
        x_NC = batch.x_BTC.flatten(0, 1).float()
        target_ND = _read_output(block, batch, x_NC)
        residual_ND = functional.linear(x_NC[:, is_removed_C], removed_DC)
        if batch.dense_BTD is not None:
            correction_ND = _compute_correction(model, block, batch, batch.dense_BTD, pull)
            target_ND += correction_ND
            residual_ND += correction_ND
        x_NS = _select_inputs(x_NC, columns, fits_weight, fits_bias)
        energy_N = sum_in_double(target_ND.square(), 1)
        if is_normed:
            _divide_by_norms(target_ND, x_NS, residual_ND, energy_N)
        moments[batch.is_held_out].add(x_NS, residual_ND)
        energies[batch.is_held_out] += energy_N.sum()
        if tokens is not None:
            start = tokens_seen[batch.is_held_out]
            tokens_seen[batch.is_held_out] += len(target_ND)
            _keep_tokens(tokens[batch.is_held_out], start, batch.input_BTD.flatten(0, 1), target_ND)
    return _add_ranks(block, moments, energies, memory)


def _read_output(block: Block, batch: BlockActivations, x_NC: Tensor) -> Tensor:
    """Return the block's output in float32; in narrower types it was rounded, so compute it again."""
    weight_DC, bias_D = block.output.weight, block.output.bias
    if weight_DC.dtype == torch.float32:
        return batch.output_BTD.flatten(0, 1)
    output_ND = torch.cat([functional.linear(x_NC, rows_RC.float()) for rows_RC in weight_DC.split(_ROWS)], 1)
    if bias_D is not None:
        output_ND += bias_D.float()
    return output_ND


def _compute_correction(
    model: PreTrainedModel, block: Block, batch: BlockActivations, dense_BTD: Tensor, pull: float
) -> Tensor:
    """Compute the change of the block's output that moves hidden states by `pull` towards the dense model's."""
    after_BTD = batch.before_BTD + compute_addition(model, block.key, batch.output_BTD)
    correction_BTD = dense_BTD.float() - after_BTD.float()
    correction_BTD *= pull / read_residual_multiplier(model.config)
    return correction_BTD.flatten(0, 1)


def _select_inputs(x_NC: Tensor, columns: Tensor, fits_weight: bool, fits_bias: bool) -> Tensor:
    x_NS = x_NC[:, columns] if fits_weight else x_NC[:, :0]
    return functional.pad(x_NS, (0, 1), value=1.0) if fits_bias else x_NS


def _divide_by_norms(target_ND: Tensor, x_NS: Tensor, residual_ND: Tensor, energy_N: Tensor) -> None:
    """Divide each token by the norm of its target in place: the model normalises the output, so only ratios count."""
    norm_N1 = target_ND.norm(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    x_NS /= norm_N1
    residual_ND /= norm_N1
    energy_N /= to_double(norm_N1[:, 0]).square()


def _keep_tokens(pairs: TokenPairs, start: int, input_ND: Tensor, target_ND: Tensor) -> None:
    rows = slice(start, start + len(target_ND))
    pairs.x_ND[rows] = input_ND
    pairs.y_ND[rows] = target_ND


def _add_ranks(block: Block, moments: list[Moments], energies: list[Tensor], memory: Memory) -> BlockMoments:
    for sums in moments:
        sums.sum_across_ranks()
    add_across_ranks(energies, memory.device)
    if not all(sums.is_finite() and energy.isfinite() for sums, energy in zip(moments, energies, strict=True)):
        raise ValueError(
            f"{block.key}: the input or the target of its output projection is not finite on the calibration text: "
            "activations overflow; load the model with dtype bfloat16 or float32"
        )
    judged = 1 if moments[1].gram.tokens > 0 else 0  # nothing is held out of a single batch
    return BlockMoments(moments[0], moments[judged], float(energies[judged]))
