"""Costs of Gram matrices, of their factorisations and of solving with them, in float32 and float64.

torch's counter counts products, but not factorisations, solutions or products that are added in place. The formulas
count these in `double_flops`: `n³ / 3` for a Cholesky factor, `n² m` for a triangular solution and `2 n³ / 3` for an LU
factor.
"""

from gqaprune.planning.costs.base import DOUBLE, SINGLE, Cost, Text, share_of_panels
from gqaprune.surgery.gram import COLUMNS, chunk_rows


def sum_gram(size: int, text: Text) -> Cost:
    """Cost of `Σ x xᵀ` over a text: products in float32, their sum in float64."""
    share = share_of_panels(size, chunk_rows(size, size))
    moved = SINGLE * text.tokens * size + text.calls * share * size**2 * (2 * SINGLE + 2 * DOUBLE)
    return Cost(single_flops=2.0 * text.tokens * share * size**2, bytes_moved=moved)


def sum_cross(inputs: int, outputs: int, text: Text) -> Cost:
    """Cost of `Σ y xᵀ` over a text: products in float32, their sum in float64."""
    moved = SINGLE * text.tokens * (inputs + outputs) + text.calls * inputs * outputs * (2 * SINGLE + 2 * DOUBLE)
    return Cost(single_flops=2.0 * text.tokens * inputs * outputs, bytes_moved=moved)


def multiply_double(rows: int, inner: int, columns: int) -> Cost:
    """Cost of a product in float64."""
    moved = DOUBLE * (rows * inner + inner * columns + rows * columns)
    return Cost(double_flops=2.0 * rows * inner * columns, bytes_moved=moved)


def factorise(size: int) -> Cost:
    """Cost of a Cholesky factor, panel by panel; the diagonal block of each panel is computed whole."""
    flops = 0.0
    for panel in chunk_rows(size, size):
        rows, above = panel.stop - panel.start, panel.start
        flops += rows * above**2 + 2 * rows**2 * above + rows**3 / 3
    return Cost(double_flops=flops, bytes_moved=2.0 * DOUBLE * size**2)


def solve(size: int, rows: int) -> Cost:
    """Cost of solving `x · L · Lᵀ = right` for a number of rows."""
    return Cost(double_flops=2.0 * size**2 * rows, bytes_moved=2.0 * DOUBLE * (size**2 / 2 + 2 * size * rows))


def multiply_symmetric(size: int, rows: int) -> Cost:
    """Cost of rows times a symmetric matrix in panels: diagonal blocks once, the part left of them twice."""
    panels = chunk_rows(size, size)
    products = sum((panel.stop - panel.start) * (panel.stop + panel.start) for panel in panels)
    return Cost(double_flops=2.0 * rows * products, bytes_moved=DOUBLE * (size**2 + 2 * size * rows))


def invert_diagonal(size: int, width: int) -> Cost:
    """Cost of the diagonal blocks of an inverse from its factor, some columns of the factor's inverse at a time."""
    step = max(1, min(COLUMNS, chunk_rows(size, size)[0].stop) // width) * width
    cost = Cost(bytes_moved=DOUBLE * size**2 / 2)
    for first in range(0, size, step):
        rows, columns = size - first, min(step, size - first)
        moved = 2.0 * DOUBLE * rows * columns
        products = 0.0 if width == 1 else 2.0 * rows * columns * width
        cost += Cost(double_flops=rows**2 * columns + products, bytes_moved=moved)
    return cost


def invert(size: int) -> Cost:
    """Cost of a whole inverse."""
    return Cost(double_flops=size**3, bytes_moved=4.0 * DOUBLE * size**2)


def solve_small(size: int, columns: int) -> Cost:
    """Cost of solving a small system that is not symmetric, for many columns."""
    flops = 2 * size**3 / 3 + 2.0 * size**2 * columns
    return Cost(double_flops=flops, bytes_moved=2.0 * DOUBLE * size * columns)
