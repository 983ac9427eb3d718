"""Ridge least squares from second moments: solve and measure without seeing a token again.

Axes in tensor names: N tokens, D outputs, R some of them, S inputs and, where there is a bias, last among them a
constant 1 whose weight it is.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gqaprune.common.distributed import add_across_ranks
from gqaprune.surgery.gram import Gram, Memory, Panels, chunk_rows


class Moments:
    """Sums over tokens, float64: all that least squares need of targets y on inputs x.

    Args:
        inputs: how many.
        outputs: how many.
        memory: that keeps the sums.

    Attributes:
        gram: `Σ x xᵀ`.
        rows: outputs that are worked on together.
        cross: `Σ y xᵀ` of each of these rows, `[R, S]`.
        energy: `Σ ‖y‖²`, a scalar.
    """

    def __init__(self, inputs: int, outputs: int, memory: Memory) -> None:
        self.gram = Gram(inputs, memory)
        self.rows = chunk_rows(outputs, inputs)
        self.cross = [memory.make_zeros(rows.stop - rows.start, inputs) for rows in self.rows]
        self.energy = torch.zeros((), dtype=torch.float64, device=memory.device)

    def add(self, x_NS: Tensor, y_ND: Tensor) -> None:
        """Add tokens, float32; products are float32."""
        self.gram.add(x_NS)
        for rows, cross_RS in zip(self.rows, self.cross, strict=True):
            cross_RS += (y_ND[:, rows].T @ x_NS).to(cross_RS.device)
        self.energy += y_ND.square().sum(dtype=torch.float64)

    def sum_across_ranks(self) -> None:
        """Add what all ranks saw; every rank gets the same bits."""
        self.gram.sum_across_ranks()
        add_across_ranks([*self.cross, self.energy], self.gram.device)

    def is_finite(self) -> bool:
        """Whether all sums are: no product is larger than both squares."""
        return self.gram.is_finite() and bool(self.energy.isfinite())

    def read_cross(self, index: int) -> Tensor:
        """`Σ y xᵀ` of some outputs, on the device: a copy where it is kept elsewhere."""
        return self.cross[index].to(self.gram.device)

    def measure_change(self, index: int, weight_RS: Tensor) -> Tensor:
        """`Σ ‖w x − y‖² − ‖y‖²` of some outputs, a scalar."""
        change_RS = self.gram.multiply(weight_RS)
        change_RS.sub_(self.read_cross(index), alpha=2)
        return change_RS.mul_(weight_RS).sum()


def search_downhill(ridges: Sequence[float], measure: Callable[[float], float]) -> None:
    """Measure ridges from the middle one on until both neighbours of the best are worse: as a rule there is one valley.

    Args:
        ridges: to choose from, one or more.
        measure: gives a ridge's error, infinite where it is too weak for a solution; called once for each.
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
    parts: Sequence[Moments],
    held_out: Moments,
    ridge: float,
    penalised: int,
    factor: Panels,
    write: Callable[[slice, Tensor], None] = lambda rows, weight_RS: None,
) -> float:
    """Weights that minimise `Σ ‖w x − t‖² + λ ‖w − w₀‖²`, with λ `ridge` times the mean square of penalised inputs.

    Args:
        start_DS: the weights `w₀` to stay near.
        parts: moments to fit, together; their targets are what is missing with `w₀`, `y = t − w₀ x`.
        held_out: the same on which to judge.
        ridge: strength of the penalty.
        penalised: how many inputs have it, from the first on: all but the constant.
        factor: memory for the Cholesky factor.
        write: gets some outputs and their new weights, in the type of `w₀`.

    Returns:
        `Σ ‖w x − t‖²` on the held-out tokens, of the weights in that type; infinite, and nothing is written, where the
        ridge is too weak for a solution.
    """
    diagonal_S = torch.stack([part.gram.get_diagonal() for part in parts]).sum(0)
    penalty_S = torch.zeros_like(diagonal_S)
    if penalised:
        penalty_S[:penalised] = ridge * float(diagonal_S[:penalised].mean())
    if not factor.factorise([part.gram for part in parts], penalty_S):
        return float("inf")
    error = held_out.energy.clone()
    for index, rows in enumerate(held_out.rows):
        change_RS = parts[0].read_cross(index).clone()
        for part in parts[1:]:
            change_RS += part.read_cross(index)
        factor.solve(change_RS)
        start_RS = start_DS[rows].to(change_RS)
        new_RS = change_RS.add_(start_RS).to(start_DS.dtype)  # judged as it will be stored
        write(rows, new_RS)
        error += held_out.measure_change(index, change_RS.copy_(new_RS).sub_(start_RS))
    return float(error.clamp_min(0))
