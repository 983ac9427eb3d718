"""Gram matrices and their Cholesky factors in panels of rows, of which a device holds a bounded part at a time.

Of a matrix its lower triangle is kept: a panel is some rows up to the end of their diagonal block. Panels that the
device has no room for lie in the host's memory or, where the device is a CPU, in files. A small matrix is one panel.

Axes in tensor names: N tokens, S columns of the inputs and rows of the matrix, P rows of one panel, R rows of a
right-hand side, C some columns of the inverse.
"""

import os
import tempfile
from collections.abc import Sequence
from typing import IO

import torch
from torch import Tensor

from gqaprune.common.distributed import add_across_ranks

WORKSPACE = 2**29
"""Bytes that Gram matrices, factors and the work on them take at most on a CPU: 3/8 to stay, 5/8 to work in. A GPU with
more free memory keeps more."""
COLUMNS = 512
"""Columns of an inverse that are solved for together, or one unit's."""


def find_room(device: torch.device, spared: int = 0) -> int:
    """Bytes of a device that matrices may stay in: half of what a GPU has free, never less than on a CPU.

    What does not fit goes to the host and back at every use: 1.6 GB for a `down_proj` of Llama-3-8B.

    Args:
        device: that works on the matrices.
        spared: bytes of a GPU that other work takes meanwhile.
    """
    least = WORKSPACE * 3 // 8
    if device.type != "cuda":
        return least
    free, _ = torch.cuda.mem_get_info(device)
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # torch's own, to be used again
    return max(least, (free + unused - spared) // 2)


class Memory:
    """Where matrices are kept: on a device as long as its part of the workspace lasts, then elsewhere.

    On a GPU elsewhere is the host's memory. On a CPU it is a file in the folder for temporary files, which has no name
    any more and is mapped into memory: the system may write its pages out and drop them.

    Args:
        device: that works on the matrices.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self._left = device, find_room(device)

    def make_zeros(self, rows: int, columns: int, dtype: torch.dtype = torch.float64) -> Tensor:
        """A matrix of zeros.

        Raises:
            ValueError: if the disk has no room for it.
        """
        size = rows * columns * dtype.itemsize
        if size <= self._left:
            self._left -= size
            return torch.zeros(rows, columns, dtype=dtype, device=self.device)
        if self.device.type != "cpu":
            return torch.zeros(rows, columns, dtype=dtype)
        with tempfile.NamedTemporaryFile(prefix="gqaprune-") as file:
            try:  # else a full disk would end the process at a write
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(file.fileno(), 0, size)
                else:  # macOS
                    _fill_with_zeros(file, size)
            except OSError as error:
                raise ValueError(
                    f"a Gram matrix takes {size / 1e6:,.0f} MB more than {tempfile.gettempdir()} has room for "
                    f"({error.strerror}); set TMPDIR to a folder on a disk with more"
                ) from error
            return torch.from_file(file.name, shared=True, size=rows * columns, dtype=dtype).view(rows, columns)


def _fill_with_zeros(file: IO[bytes], size: int) -> None:
    zeros = bytes(2**20)
    for start in range(0, size, len(zeros)):
        file.write(zeros[: size - start])
    file.flush()


def chunk_rows(rows: int, columns: int) -> list[slice]:
    """Chunks of consecutive rows of a matrix: as many as an eighth of the workspace holds in float64, at least one."""
    step = max(1, WORKSPACE // 8 // (8 * max(1, columns)))
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def count_panel_bytes(size: int) -> int:
    """Bytes of the panels of a matrix of so many rows."""
    elements: int = sum((rows.stop - rows.start) * rows.stop for rows in chunk_rows(size, size))
    return 8 * elements


class Panels:
    """A symmetric or a lower triangular matrix, float64, zeros at first.

    Args:
        size: its rows and columns.
        memory: that keeps it.
    """

    def __init__(self, size: int, memory: Memory) -> None:
        self.size, self.device = size, memory.device
        self.slices = chunk_rows(size, size)
        self.panels = [memory.make_zeros(rows.stop - rows.start, rows.stop) for rows in self.slices]

    def read(self, index: int) -> Tensor:
        """A panel on the device: a copy where it is kept elsewhere."""
        return self.panels[index].to(self.device)

    def get_diagonal(self) -> Tensor:
        """A copy of the diagonal, on the device."""
        diagonals = [
            panel[:, rows].diagonal().to(self.device) for rows, panel in zip(self.slices, self.panels, strict=True)
        ]
        return torch.cat(diagonals)

    def to_dense(self) -> Tensor:
        """The whole of it as a symmetric matrix, a copy on the device."""
        dense_SS = torch.zeros(self.size, self.size, dtype=torch.float64, device=self.device)
        for index, rows in enumerate(self.slices):
            panel_PS = self.read(index)
            dense_SS[rows, : rows.stop] = panel_PS
            dense_SS[: rows.start, rows] = panel_PS[:, : rows.start].T
        return dense_SS

    def multiply(self, left_RS: Tensor) -> Tensor:
        """`left · self`, self being symmetric, `[R, S]`."""
        product_RS = torch.zeros_like(left_RS)
        for index, rows in enumerate(self.slices):
            panel_PS = self.read(index)
            product_RS[:, : rows.stop].addmm_(left_RS[:, rows], panel_PS)
            product_RS[:, rows].addmm_(left_RS[:, : rows.start], panel_PS[:, : rows.start].T)
        return product_RS

    def factorise(self, parts: "Sequence[Panels]", penalty_S: Tensor) -> bool:
        """Become the lower Cholesky factor of a sum of symmetric matrices and a diagonal, panel by panel.

        Args:
            parts: the matrices, of the same size; this one may be the first.
            penalty_S: the diagonal.

        Returns:
            Whether the sum is positive definite; this matrix holds nothing of use if not.
        """
        for index, rows in enumerate(self.slices):
            panel_PS = parts[0].read(index).clone()
            for part in parts[1:]:
                panel_PS += part.read(index)
            panel_PS[:, rows].diagonal().add_(penalty_S[rows])
            for above, block in enumerate(self.slices[:index]):
                factor_PS = self.read(above)
                tile = panel_PS[:, block]
                tile.addmm_(panel_PS[:, : block.start], factor_PS[:, : block.start].T, alpha=-1)
                tile.copy_(torch.linalg.solve_triangular(factor_PS[:, block].T, tile, upper=True, left=False))
            tile = panel_PS[:, rows]
            tile.addmm_(panel_PS[:, : rows.start], panel_PS[:, : rows.start].T, alpha=-1)
            diagonal, failed = torch.linalg.cholesky_ex(tile)
            if failed:
                return False
            tile.copy_(diagonal)
            self.panels[index].copy_(panel_PS)
        return True

    def solve(self, right_RS: Tensor) -> None:
        """Solve `x · L · Lᵀ = right` in place, self being the factor `L`, or of fewer columns its first part.

        The factor of a matrix's first rows and columns is that part of its factor.
        """
        size = right_RS.shape[1]
        slices = [slice(rows.start, min(rows.stop, size)) for rows in self.slices if rows.start < size]
        for index, rows in enumerate(slices):
            factor_PS, tile = self._read_first(index, rows), right_RS[:, rows]
            tile.addmm_(right_RS[:, : rows.start], factor_PS[:, : rows.start].T, alpha=-1)
            tile.copy_(torch.linalg.solve_triangular(factor_PS[:, rows].T, tile, upper=True, left=False))
        for index, rows in reversed(list(enumerate(slices))):
            factor_PS, tile = self._read_first(index, rows), right_RS[:, rows]
            tile.copy_(torch.linalg.solve_triangular(factor_PS[:, rows], tile, upper=False, left=False))
            right_RS[:, : rows.start].addmm_(tile, factor_PS[:, : rows.start], alpha=-1)

    def _read_first(self, index: int, rows: slice) -> Tensor:
        """The first rows and columns of a panel on the device."""
        return self.panels[index][: rows.stop - rows.start, : rows.stop].to(self.device)

    def invert_diagonal(self, width: int) -> Tensor:
        """Blocks of `(L · Lᵀ)⁻¹` on its diagonal, each of so many columns: `[blocks, width, width]`, L being self.

        The columns of `L⁻¹` that belong to some blocks are solved for at a time.
        """
        columns = chunk_rows(self.size, self.size)[0].stop
        step = max(1, min(COLUMNS, columns) // width) * width
        return torch.cat([self._invert(start, step, width) for start in range(0, self.size, step)])

    def _invert(self, first: int, step: int, width: int) -> Tensor:
        """The same of `step` columns from `first` on, above which their columns of `L⁻¹` are 0."""
        last = min(first + step, self.size)
        inverse_SC = torch.zeros(self.size - first, last - first, dtype=torch.float64, device=self.device)
        inverse_SC[: last - first].fill_diagonal_(1.0)
        for index, rows in enumerate(self.slices):
            start = max(first, rows.start)
            if start < rows.stop:
                factor_PS = self.read(index)[start - rows.start :]
                tile = inverse_SC[start - first : rows.stop - first]
                tile.addmm_(factor_PS[:, first:start], inverse_SC[: start - first], alpha=-1)
                tile.copy_(torch.linalg.solve_triangular(factor_PS[:, start:], tile, upper=False))
        if width == 1:
            return inverse_SC.square_().sum(0)[:, None, None]
        return torch.stack([block.T @ block for block in inverse_SC.split(width, dim=1)])


class Gram(Panels):
    """`Σ x xᵀ` over tokens; products are float32, their sums float64.

    Attributes:
        tokens: how many there were, a scalar.
    """

    def __init__(self, size: int, memory: Memory) -> None:
        super().__init__(size, memory)
        self.tokens = torch.zeros((), dtype=torch.float64, device=memory.device)

    def add(self, x_NS: Tensor) -> None:
        """Add tokens, float32."""
        self.tokens += len(x_NS)
        for rows, panel_PS in zip(self.slices, self.panels, strict=True):
            panel_PS += (x_NS[:, rows].T @ x_NS[:, : rows.stop]).to(panel_PS.device)

    def sum_across_ranks(self) -> None:
        """Add what all ranks saw; every rank gets the same bits."""
        add_across_ranks([self.tokens, *self.panels], self.device)

    def is_finite(self) -> bool:
        """Whether all of it is: what is not shows on the diagonal, for no product is larger than both squares."""
        return bool(self.get_diagonal().isfinite().all())
