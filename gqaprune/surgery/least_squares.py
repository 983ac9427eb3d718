"""Ridge least squares from second moments: solve and measure errors without reading the tokens again.

Axes in tensor names: N tokens, D outputs, R some of them, S inputs. A bias is the weight of a last input, always 1.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gqaprune.common.distributed import add_across_ranks
from gqaprune.common.precision import sum_in_double
from gqaprune.surgery.gram import Gram, Memory, Panels, chunk_rows


class Moments:
    """Second moments of inputs x and targets y, summed over tokens in float64: all that least squares need.

    Args:
        inputs: number of inputs.
        outputs: number of outputs.
        memory: where the sums are kept.

    Attributes:
        gram: `Σ x xᵀ`.
        rows: chunks of outputs that are processed together.
        cross: `Σ y xᵀ` of each chunk, `[R, S]`.
        energy: `Σ ‖y‖²`, a scalar.
    """

    def __init__(self, inputs: int, outputs: int, memory: Memory) -> None:
        self.gram = Gram(inputs, memory)
        self.rows = chunk_rows(outputs, inputs)
        self.cross = [memory.make_zeros(rows.stop - rows.start, inputs) for rows in self.rows]
        self.energy = torch.zeros((), dtype=torch.float64, device=memory.device)

    def add(self, x_NS: Tensor, y_ND: Tensor) -> None:
        """Add tokens in float32. Products are computed in float32."""
        self.gram.add(x_NS)
        for rows, cross_RS in zip(self.rows, self.cross, strict=True):
            cross_RS += (y_ND[:, rows].T @ x_NS).to(cross_RS.device)
        self.energy += sum_in_double(y_ND.square())

    def sum_across_ranks(self) -> None:
        """Sum over all ranks; every rank gets the same bits."""
        self.gram.sum_across_ranks()
        add_across_ranks([*self.cross, self.energy], self.gram.device)

    def is_finite(self) -> bool:
        """Whether all sums are finite. The squares tell: no product is larger than both of its squares."""
        return self.gram.is_finite() and bool(self.energy.isfinite())

    def read_cross(self, index: int) -> Tensor:
        """Return `Σ y xᵀ` of a chunk of outputs on the device, copied if it is kept elsewhere."""
        return self.cross[index].to(self.gram.device)

    def measure_change(self, index: int, weight_RS: Tensor) -> Tensor:
        """Compute `Σ ‖w x − y‖² − ‖y‖²` of a chunk of outputs, a scalar."""
        change_RS = self.gram.multiply(weight_RS)
        change_RS.sub_(self.read_cross(index), alpha=2)
        return change_RS.mul_(weight_RS).sum()


def search_downhill(ridges: Sequence[float], measure: Callable[[float], float]) -> None:
    """Measure ridges, starting at the middle one, until both neighbours of the best one are worse.

    As a rule the error has a single minimum.

    Args:
        ridges: ridges to choose from, at least one.
        measure: returns the error of a ridge, infinite if the ridge is too weak for a solution. Called at most once for
            each ridge.
    """
    ordered = sorted(set(ridges))
    middle = len(ordered) // 2
    start = measure(ordered[middle])
    for direction in (ordered[middle + 1 :], ordered[:middle][::-1]):
        least = start
        for ridge in direction:
            if (error := measure(ridge)) > least:
                break
            least = error
        if least < start:
            break


def refit(
    start_DS: Tensor,
    fit: Sequence[Moments],
    held_out: Moments,
    ridge: float,
    penalised: int,
    factor: Panels,
    write: Callable[[slice, Tensor], None] = lambda rows, weight_RS: None,
) -> float:
    """Find weights that minimise `Σ ‖w x − t‖² + λ ‖w − w₀‖²`; λ is `ridge` times the mean square of penalised inputs.

    Args:
        start_DS: the weights `w₀` to stay close to.
        fit: moments to fit, added up; their targets are the residuals of `w₀`, `y = t − w₀ x`.
        held_out: moments of the same kind to measure the error on.
        ridge: strength of the penalty.
        penalised: number of inputs with a penalty, from the first: all but the constant.
        factor: storage for the Cholesky factor.
        write: called with some outputs and their new weights, in the dtype of `w₀`.

    Returns:
        `Σ ‖w x − t‖²` on the held-out tokens, with the weights rounded to that dtype. Infinite if the ridge is too weak
        for a solution; nothing is written then.
    """
    diagonal_S = torch.stack([moments.gram.get_diagonal() for moments in fit]).sum(0)
    penalty_S = torch.zeros_like(diagonal_S)
    if penalised:
        penalty_S[:penalised] = ridge * float(diagonal_S[:penalised].mean())
    if not factor.factorise([moments.gram for moments in fit], penalty_S):
        return float("inf")
    error = held_out.energy.clone()
    for index, rows in enumerate(held_out.rows):
        change_RS = fit[0].read_cross(index).clone()
        for moments in fit[1:]:
            change_RS += moments.read_cross(index)
        factor.solve(change_RS)
        start_RS = start_DS[rows].to(change_RS)
        new_RS = change_RS.add_(start_RS).to(start_DS.dtype)  # its error is measured as it will be stored
        write(rows, new_RS)
        error += held_out.measure_change(index, change_RS.copy_(new_RS).sub_(start_RS))
    return float(error.clamp_min(0))
