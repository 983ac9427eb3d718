"""Ridge least squares from second moments: solve and measure without seeing a token again.

Axes in tensor names: N tokens, D outputs, S inputs and, last among them, a constant 1 whose weight is the bias.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Moments:
    """Sums over tokens, float64: all that least squares of targets y on inputs x need.

    Args:
        gram_SS: `Σ x xᵀ`.
        cross_SD: `Σ x yᵀ`.
        energy: `Σ ‖y‖²`, a scalar.
    """

    gram_SS: Tensor
    cross_SD: Tensor
    energy: Tensor

    @classmethod
    def of_no_tokens(cls, inputs: int, weight_DC: Tensor) -> "Moments":
        """Zeros for so many inputs, of a projection with as many rows as `weight_DC` and on its device."""
        shapes = ((inputs, inputs), (inputs, len(weight_DC)), ())
        return cls(*(weight_DC.new_zeros(shape, dtype=torch.float64) for shape in shapes))

    def add(self, x_NS: Tensor, y_ND: Tensor) -> None:
        """Add tokens, float32; products are float32."""
        self.gram_SS += x_NS.T @ x_NS
        self.cross_SD += x_NS.T @ y_ND
        self.energy += y_ND.square().sum(dtype=torch.float64)

    def __add__(self, other: "Moments") -> "Moments":
        return Moments(self.gram_SS + other.gram_SS, self.cross_SD + other.cross_SD, self.energy + other.energy)

    def measure_error(self, weight_SD: Tensor) -> float:
        """`Σ ‖xᵀ w − y‖²` relative to `Σ ‖y‖²`; 0 where there is no target."""
        error = self.energy + (weight_SD * (self.gram_SS @ weight_SD - 2 * self.cross_SD)).sum()
        return float(error.clamp_min(0) / self.energy) if self.energy > 0 else 0.0

    def solve(self, weight_SD: Tensor, ridge: float, free: slice) -> Tensor:
        """The weights that minimise `Σ ‖xᵀ w − y‖² + λ ‖w − w₀‖²`, with λ `ridge` times the columns' mean square.

        A bias is free of the penalty.

        Args:
            weight_SD: the weights `w₀` to stay near.
            ridge: strength of that.
            free: which of them may change.

        Returns:
            The weights; `w₀` where the ridge is too weak for a solution.
        """
        penalty_S = torch.full_like(self.gram_SS[0], ridge * float(self.gram_SS.diagonal()[:-1].mean()))
        penalty_S[-1] = 0
        residual_SD = self.cross_SD - self.gram_SS @ weight_SD
        factor, failed = torch.linalg.cholesky_ex((self.gram_SS + penalty_S.diag())[free, free])
        if failed:
            return weight_SD
        solution_SD = weight_SD.clone()
        solution_SD[free] += torch.cholesky_solve(residual_SD[free], factor)
        return solution_SD
