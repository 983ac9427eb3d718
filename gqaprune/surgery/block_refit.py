"""Refit the output projection of a block that has been cut: try ridges, keep the best weights, the same on every rank.

Axes in tensor names: D outputs, R some of them, S what is fitted: the kept columns and, last, the bias.
"""

from collections.abc import Sequence

from torch import Tensor

from gqaprune.common.distributed import get_rank_and_world_size, sum_across_ranks
from gqaprune.models.architecture import Block
from gqaprune.surgery.block_targets import BlockMoments
from gqaprune.surgery.gram import Memory, Panels, chunk_rows
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
    """Write the best weights into a block that has been cut, those of rank 0 on every rank.

    Those of the best ridge, fitted on all batches; those of the cut where no ridge beats them.

    Args:
        block: the block, already cut.
        moments: of what it takes and should give.
        memory: for weights and factor.
        ridges: to choose from; 0 alone where only a bias is fitted, which has no penalty.
        fits_weight: whether the weight is fitted.
        fits_bias: whether the bias is.
        spares_held_out: fit without the held-out batches, because refinement is judged on them: weights that have seen
            them would look better there than all that training makes of them.

    Returns:
        The ridge, None where the weights are those of the cut; the errors before and after on the held-out batches,
        relative to the target's square.
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
    # Weights of the best ridge so far, and of the one that is tried. At an infinite one they stay as they are.
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
            write(slice(None), weights_DS[0])  # what is stored of the fit on all batches is worse for them
    for parameter in fitted:
        _copy_from_first_rank(parameter)
    scale = moments.energy or 1.0
    return ridge if after < before else None, before / scale, after / scale


def _copy_from_first_rank(weight_DC: Tensor) -> None:
    rank, _ = get_rank_and_world_size()
    for rows in chunk_rows(*weight_DC.shape):
        weight_DC[rows] = sum_across_ranks({"weights": weight_DC[rows].double() * (rank == 0)})["weights"]
