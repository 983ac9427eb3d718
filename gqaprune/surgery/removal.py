"""Predict from Gram matrices how the output of a block changes when units are removed, without cutting anything.

The kept columns S make up for the removed columns R as in repair: `ΔW` minimises `Σ ‖ΔW x_S − W_R x_R‖² + λ ‖ΔW‖²` over
the tokens to fit on. The result is an error matrix E: the block's output becomes `(W − E) x`. Sources: Hassibi and
Stork 1992; for structures of language models, ZipLM, arXiv 2302.04089.

Axes in tensor names: D outputs, R some of them, C columns, S kept columns.
"""

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from gqaprune.common.precision import to_double
from gqaprune.models.architecture import Block
from gqaprune.surgery.gram import Gram, Memory, Panels, chunk_rows

RIDGE = 0.1
"""Ridge, relative to the mean squared input. Repair chooses among several, most often this one or its neighbours."""
_TINY = torch.finfo(torch.float64).tiny


def remove_weakest(block: Block, fit: Gram, order_C: Tensor, counts: Sequence[int], *, refits: bool) -> list[Tensor]:
    """Compute the error matrices of removing different numbers of a block's weakest units.

    One factorisation serves all counts, because the Cholesky factor of the first columns is a part of it.

    Args:
        block: an MLP, whose units have one column each.
        fit: Gram matrix of the inputs of its output projection, with columns in the order `order_C`.
        order_C: columns, the most important first.
        counts: numbers of units to remove.
        refits: whether the kept columns are refitted.

    Returns:
        One matrix E for each count, `[D, C]` in the dtype of the weights.
    """
    weight_DC, columns = block.output.weight, len(order_C)
    diagonal_C = fit.get_diagonal()
    factor = Panels(columns, Memory(fit.device)) if refits else None
    penalty_C = torch.full_like(diagonal_C, max(RIDGE * float(diagonal_C.mean()), _TINY))
    if factor is not None and not factor.factorise([fit], penalty_C):
        factor = None
    errors_DC = [torch.zeros_like(weight_DC) for _ in counts]
    for rows in chunk_rows(*weight_DC.shape):
        weight_RC = to_double(weight_DC[rows][:, order_C])
        for error_DC, removed in zip(errors_DC, counts, strict=True):
            kept = columns - removed
            error_RC = weight_RC.clone()
            error_RC[:, :kept] = 0
            if factor is not None and kept:
                change_RS = fit.multiply(error_RC)[:, :kept].contiguous()
                factor.solve(change_RS)
                error_RC[:, :kept] = -change_RS
            error_DC[rows.start : rows.stop, order_C] = error_RC.to(error_DC)
    return errors_DC


def remove_one_by_one(
    block: Block, fit: Gram, judged: Gram, outliers: Collection[int], counts: Sequence[int], *, refits: bool
) -> tuple[list[Tensor], list[int]]:
    """Remove units one by one, from each group in turn, always the unit whose removal adds the least error.

    Args:
        block: attention, with few units of many columns each.
        fit: Gram matrix of the inputs of its output projection, on tokens to fit on.
        judged: the same on held-out tokens, where the error is measured.
        outliers: units that are removed after all others of their group.
        counts: numbers of units removed from each group whose error matrix is returned.
        refits: whether the kept columns are refitted.

    Returns:
        One matrix E for each count, `[D, C]` in the dtype of the weights; and all units in the order of their removal.
    """
    weight_DC = to_double(block.output.weight)
    judged_CC, inverse_CC = judged.to_dense(), _invert(fit) if refits else None
    error_DC = torch.zeros_like(weight_DC)
    kept, size = set(range(block.units)), block.units // block.groups
    order, errors_DC = list[int](), list[Tensor]()
    for removed in range(1, size + 1):
        for group in range(block.groups):
            units = sorted(kept & set(range(group * size, (group + 1) * size)))
            candidates = [unit for unit in units if unit not in outliers] or units
            best, change_DC = _choose(
                block, weight_DC - error_DC, error_DC @ judged_CC, judged_CC, inverse_CC, candidates
            )
            error_DC = error_DC + change_DC
            if inverse_CC is not None:
                _eliminate(inverse_CC, _list_columns(block, best))
            kept.remove(best)
            order.append(best)
        if removed in counts:
            errors_DC.append(error_DC.to(block.output.weight))
    return errors_DC, order


def _choose(
    block: Block,
    kept_DC: Tensor,
    slope_DC: Tensor,
    judged_CC: Tensor,
    inverse_CC: Tensor | None,
    candidates: Sequence[int],
) -> tuple[int, Tensor]:
    """Choose the unit whose removal adds the least squared error on held-out tokens; return it and the change of E.

    Args:
        block: the block.
        kept_DC: `W − E` so far.
        slope_DC: `E · judged`, half the slope of the squared error in E.
        judged_CC: Gram matrix of held-out tokens.
        inverse_CC: inverse of the regularised Gram matrix of the kept columns; None if nothing is refitted.
        candidates: units to choose from.
    """
    best, least, best_change_DC = candidates[0], float("inf"), kept_DC
    for unit in candidates:
        change_DC = _remove(kept_DC, inverse_CC, _list_columns(block, unit))
        increase = float((change_DC * (2 * slope_DC + change_DC @ judged_CC)).sum())
        if increase < least:
            best, least, best_change_DC = unit, increase, change_DC
    return best, best_change_DC


def _list_columns(block: Block, unit: int) -> slice:
    return slice(unit * block.columns_per_unit, (unit + 1) * block.columns_per_unit)


def _invert(fit: Gram) -> Tensor:
    """Compute `(Σ x xᵀ + λI)⁻¹`, `[C, C]`."""
    gram_CC = fit.to_dense()
    gram_CC.diagonal().add_(max(RIDGE * float(gram_CC.diagonal().mean()), _TINY))
    return torch.cholesky_inverse(torch.linalg.cholesky(gram_CC))


def _remove(kept_DC: Tensor, inverse_CC: Tensor | None, columns: slice) -> Tensor:
    """Compute how E changes when `columns` are removed and, given an inverse, the kept columns are refitted."""
    if inverse_CC is None:
        change_DC = torch.zeros_like(kept_DC)
        change_DC[:, columns] = kept_DC[:, columns]
        return change_DC
    solution: Tensor = torch.linalg.solve(inverse_CC[columns, columns], inverse_CC[columns])
    return kept_DC[:, columns] @ solution


def _eliminate(inverse_CC: Tensor, columns: slice) -> None:
    """Update an inverse in place to that of the matrix without these rows and columns, which become 0."""
    inverse_CC -= inverse_CC[:, columns] @ torch.linalg.solve(inverse_CC[columns, columns], inverse_CC[columns])
    inverse_CC[columns] = 0
    inverse_CC[:, columns] = 0
