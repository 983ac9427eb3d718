"""Refit the output projection of a cut block: try several ridges and keep the best weights, the same on every rank.

Axes in tensor names: D outputs, R some of them, S the fitted columns: the kept columns and, at the end, the bias.
"""

from collections.abc import Sequence

from torch import Tensor

from gqaprune.common.distributed import copy_from_first_rank
from gqaprune.models.architecture import Block
from gqaprune.surgery.block_targets import BlockMoments
from gqaprune.surgery.gram import Memory, Panels
from gqaprune.surgery.least_squares import refit, search_downhill


def refit_block(
    block: Block,
    moments: BlockMoments,
    memory: Memory,
    *,
    ridges: Sequence[float],
    fits_weight: bool,
    fits_bias: bool,
    spares_held_out: bool,
) -> tuple[float | None, float, float]:
    """Refit the output projection of a cut block in place; every rank gets the weights of rank 0.

    The ridge with the least error on the held-out batches is chosen, and the weights are fitted with it on all batches.
    If no ridge has a smaller error than the cut weights, these stay.

    Args:
        block: the block, already cut.
        moments: moments of its inputs and targets.
        memory: where the weights and the Cholesky factor are kept.
        ridges: ridges to choose from; `(0.0,)` if only a bias is fitted, which has no penalty.
        fits_weight: whether the weight is fitted.
        fits_bias: whether the bias is fitted.
        spares_held_out: whether the weights are fitted without the held-out batches. Refinement is judged on these:
            weights that have seen them would look better there than any trained ones.

    Returns:
        The ridge, or None if the cut weights stay; and the errors before and after, on the held-out batches and
        relative to the sum of squared targets.
    """
    linear, held_out = block.output, moments.held_out
    fitted = [linear.weight] if fits_weight else []
    if fits_bias:
        fitted.append(linear.bias[:, None])
    widths = [parameter.shape[1] for parameter in fitted]

    def write(rows: slice, weight_RS: Tensor) -> None:
        for parameter, weight_RC in zip(fitted, weight_RS.split(widths, dim=1), strict=True):
            parameter[rows] = weight_RC

    start_DS = memory.make_zeros(len(linear.weight), sum(widths), linear.weight.dtype)
    for parameter, start_DC in zip(fitted, start_DS.split(widths, dim=1), strict=True):
        start_DC.copy_(parameter)
    penalised, factor = sum(widths) - fits_bias, Panels(sum(widths), memory)
    # Weights of the best ridge so far, and of the current one. An infinite ridge keeps the cut weights.
    weights_DS = [memory.make_zeros(len(start_DS), sum(widths), start_DS.dtype) for _ in range(2)]
    before, errors = float(held_out.energy), {float("inf"): float(held_out.energy)}

    def measure(ridge: float) -> float:
        error = refit(start_DS, [moments.fit], held_out, ridge, penalised, factor, weights_DS[1].__setitem__)
        if error < min(errors.values()):
            weights_DS.reverse()
        errors[ridge] = error
        return error

    search_downhill(ridges, measure)
    ridge, after = min(errors.items(), key=lambda item: item[1])
    if after < before:
        write(slice(None), weights_DS[0])
        all_batches = [moments.fit, held_out]
        if not spares_held_out and refit(start_DS, all_batches, held_out, ridge, penalised, factor, write) >= before:
            write(slice(None), weights_DS[0])  # rounded to their dtype, weights fitted on all batches were worse
    for parameter in fitted:
        copy_from_first_rank(parameter)
    scale = moments.energy or 1.0
    return ridge if after < before else None, before / scale, after / scale
