"""Costs of Gram matrices and of what is solved with them, in float32 and float64.

torch's counter sees products, but neither factors nor solutions nor products that are added in place: those are the
formulas' `double_flops`, counted as `n³ / 3` for a Cholesky factor, `n² m` for a triangular solution and `2 n³ / 3` for
a factor of a matrix that is not symmetric.
"""

from gqaprune.planning.costs.base import DOUBLE, SINGLE, Cost, Text, share_of_panels
from gqaprune.surgery.gram import COLUMNS, chunk_rows


def sum_gram(size: int, text: Text) -> Cost:
    """`Σ x xᵀ` over a text: products in float32, their sum in float64."""
    share = share_of_panels(size, chunk_rows(size, size))
    moved = SINGLE * text.tokens * size + text.calls * share * size**2 * (2 * SINGLE + 2 * DOUBLE)
    return Cost(single_flops=2.0 * text.tokens * share * size**2, bytes_moved=moved)


def sum_cross(inputs: int, outputs: int, text: Text) -> Cost:
    """`Σ y xᵀ` over a text, likewise."""
    moved = SINGLE * text.tokens * (inputs + outputs) + text.calls * inputs * outputs * (2 * SINGLE + 2 * DOUBLE)
    return Cost(single_flops=2.0 * text.tokens * inputs * outputs, bytes_moved=moved)


def multiply_double(rows: int, inner: int, columns: int) -> Cost:
    """A product in float64."""
    moved = DOUBLE * (rows * inner + inner * columns + rows * columns)
    return Cost(double_flops=2.0 * rows * inner * columns, bytes_moved=moved)


def factorise(size: int) -> Cost:
    """A Cholesky factor, panel by panel, of each of which the diagonal block is whole."""
    flops = 0.0
    for own in chunk_rows(size, size):
        rows, above = own.stop - own.start, own.start
        flops += rows * above**2 + 2 * rows**2 * above + rows**3 / 3
    return Cost(double_flops=flops, bytes_moved=2.0 * DOUBLE * size**2)


def solve(size: int, rows: int) -> Cost:
    """`x · L · Lᵀ = right` of a factor, for so many rows."""
    return Cost(double_flops=2.0 * size**2 * rows, bytes_moved=2.0 * DOUBLE * (size**2 / 2 + 2 * size * rows))


def multiply_symmetric(size: int, rows: int) -> Cost:
    """Rows times a symmetric matrix of which panels are kept: a whole diagonal block, and what is left of it twice."""
    panels = chunk_rows(size, size)
    products = sum((own.stop - own.start) * (own.stop + own.start) for own in panels)
    return Cost(double_flops=2.0 * rows * products, bytes_moved=DOUBLE * (size**2 + 2 * size * rows))


def invert_diagonal(size: int, width: int) -> Cost:
    """Blocks on the diagonal of an inverse, from the factor: its inverse's columns, so many at a time."""
    step = max(1, min(COLUMNS, chunk_rows(size, size)[0].stop) // width) * width
    cost = Cost(bytes_moved=DOUBLE * size**2 / 2)
    for first in range(0, size, step):
        rows, columns = size - first, min(step, size - first)
        moved = 2.0 * DOUBLE * rows * columns
        products = 0.0 if width == 1 else 2.0 * rows * columns * width
        cost += Cost(double_flops=rows**2 * columns + products, bytes_moved=moved)
    return cost


def invert(size: int) -> Cost:
    """A whole inverse, from its matrix."""
    return Cost(double_flops=size**3, bytes_moved=4.0 * DOUBLE * size**2)


def solve_small(size: int, columns: int) -> Cost:
    """A few equations, not symmetric, for many columns."""
    flops = 2 * size**3 / 3 + 2.0 * size**2 * columns
    return Cost(double_flops=flops, bytes_moved=2.0 * DOUBLE * size * columns)
