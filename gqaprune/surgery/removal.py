"""What a block loses with some of its units, the others refitted, from Gram matrices: nothing is cut.

Kept columns are refitted as repair does it, `Σ ‖ΔW x_S − W_R x_R‖² + λ ‖ΔW‖²` over the tokens to fit on. The loss is a
matrix E on the block's inputs: the block then gives `(W − E) x`. Sources: Hassibi and Stork 1992; for structures of
language models, ZipLM, arXiv 2302.04089.

Axes in tensor names: D outputs, R some of them, C columns, S kept columns, c columns of one unit.
"""

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from gqaprune.models.architecture import Block
from gqaprune.surgery.gram import Gram, Memory, Panels, chunk_rows

RIDGE = 0.1
"""Of the mean squared input. Repair chooses of several, this one and its neighbours most often."""
_TINY = torch.finfo(torch.float64).tiny


def remove_weakest(block: Block, fit: Gram, order_C: Tensor, counts: Sequence[int], *, refits: bool) -> list[Tensor]:
    """What a block loses with some numbers of its weakest units.

    One factorisation serves all numbers, for that of the first columns is a part of it.

    Args:
        block: whose units have one column each: an MLP.
        fit: Gram matrix of the inputs of its output projection, in the order that is given.
        order_C: columns, the most important first.
        counts: numbers of removed units.
        refits: whether the others are refitted.

    Returns:
        The matrix E of each number, `[D, C]` in the type of the weights.
    """
    weight_DC, columns = block.output.weight, len(order_C)
    diagonal_C = fit.get_diagonal()
    factor = Panels(columns, Memory(fit.device)) if refits else None
    penalty_C = torch.full_like(diagonal_C, max(RIDGE * float(diagonal_C.mean()), _TINY))
    if factor is not None and not factor.factorise([fit], penalty_C):
        factor = None
    lost = [torch.zeros_like(weight_DC) for _ in counts]
    for rows in chunk_rows(*weight_DC.shape):
        weight_RC = weight_DC[rows][:, order_C].to(fit.device, torch.float64)
        for loss_DC, removed in zip(lost, counts, strict=True):
            kept = columns - removed
            loss_RC = weight_RC.clone()
            loss_RC[:, :kept] = 0
            if factor is not None and kept:
                change_RS = fit.multiply(loss_RC)[:, :kept].contiguous()
                factor.solve(change_RS)
                loss_RC[:, :kept] = -change_RS
            loss_DC[rows.start : rows.stop, order_C] = loss_RC.to(loss_DC)
    return lost


def remove_one_by_one(
    block: Block, fit: Gram, judged: Gram, last: Collection[int], counts: Sequence[int], *, refits: bool
) -> tuple[list[Tensor], list[int]]:
    """Remove units one by one, from every group in turn, each time the one without which least is lost.

    Args:
        block: with few units, each of many columns: attention.
        fit: Gram matrix of the inputs of its output projection.
        judged: the same of held-out tokens, on which units are chosen.
        last: units that go after all others.
        counts: numbers of units removed from each group, of which the loss is returned.
        refits: whether the kept units are refitted.

    Returns:
        The matrix E of each number, `[D, C]` in the type of the weights; and all units in the order in which they go.
    """
    weight_DC = block.output.weight.to(fit.device, torch.float64)
    judged_CC, inverse_CC = judged.to_dense(), _invert(fit) if refits else None
    loss_DC = torch.zeros_like(weight_DC)
    left, size = set(range(block.units)), block.units // block.groups
    order, lost = list[int](), list[Tensor]()
    for removed in range(1, size + 1):
        for group in range(block.groups):
            units = sorted(left & set(range(group * size, (group + 1) * size)))
            candidates = [unit for unit in units if unit not in last] or units
            best, change_DC = _choose(
                block, weight_DC - loss_DC, loss_DC @ judged_CC, judged_CC, inverse_CC, candidates
            )
            loss_DC = loss_DC + change_DC
            if inverse_CC is not None:
                _eliminate(inverse_CC, _list_columns(block, best))
            left.remove(best)
            order.append(best)
        if removed in counts:
            lost.append(loss_DC.to(block.output.weight))
    return lost, order


def _choose(
    block: Block,
    kept_DC: Tensor,
    slope_DC: Tensor,
    judged_CC: Tensor,
    inverse_CC: Tensor | None,
    candidates: Sequence[int],
) -> tuple[int, Tensor]:
    """The unit without which the squared error on held-out tokens grows least, and what is lost with it."""
    best, least, change_DC = candidates[0], float("inf"), kept_DC
    for unit in candidates:
        own_DC = _remove(kept_DC, inverse_CC, _list_columns(block, unit))
        error = float((own_DC * (2 * slope_DC + own_DC @ judged_CC)).sum())
        if error < least:
            best, least, change_DC = unit, error, own_DC
    return best, change_DC


def _list_columns(block: Block, unit: int) -> slice:
    return slice(unit * block.columns_per_unit, (unit + 1) * block.columns_per_unit)


def _invert(fit: Gram) -> Tensor:
    """`(Σ x xᵀ + λI)⁻¹`, `[C, C]`."""
    gram_CC = fit.to_dense()
    gram_CC.diagonal().add_(max(RIDGE * float(gram_CC.diagonal().mean()), _TINY))
    return torch.cholesky_inverse(torch.linalg.cholesky(gram_CC))


def _remove(kept_DC: Tensor, inverse_CC: Tensor | None, own: slice) -> Tensor:
    """What is lost with some columns, the others that are left refitted."""
    if inverse_CC is None:
        change_DC = torch.zeros_like(kept_DC)
        change_DC[:, own] = kept_DC[:, own]
        return change_DC
    change: Tensor = torch.linalg.solve(inverse_CC[own, own], inverse_CC[own])
    return kept_DC[:, own] @ change


def _eliminate(inverse_CC: Tensor, own: slice) -> None:
    """Make an inverse that of the matrix without some rows and columns, in place; theirs become 0."""
    inverse_CC -= inverse_CC[:, own] @ torch.linalg.solve(inverse_CC[own, own], inverse_CC[own])
    inverse_CC[own] = 0
    inverse_CC[:, own] = 0
