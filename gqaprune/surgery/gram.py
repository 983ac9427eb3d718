"""Gram matrices and their Cholesky factors, stored in panels of rows so that they need little device memory.

Only the lower triangle is stored: a panel is a few rows, up to the end of their diagonal block. Panels that do not fit
on the device are kept in the host's memory or, if the device is a CPU, in files. A small matrix is a single panel.

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
from gqaprune.common.precision import find_double_device

WORKSPACE = 2**29
"""Bytes that Gram matrices and factors take at most on a CPU: 3/8 hold them, 5/8 are scratch space. A GPU with more
free memory holds more."""
COLUMNS = 512
"""Columns of an inverse that are solved for together, unless one unit has more."""


def find_room(device: torch.device, spared: int = 0) -> int:
    """Return the bytes of matrices that a device may hold: half of a GPU's free memory, at least as many as on a CPU.

    Matrices that do not fit move between host and device at every use: 1.6 GB for a `down_proj` of Llama-3-8B.

    Args:
        device: device that computes with the matrices.
        spared: bytes of a GPU that other work needs at the same time.
    """
    if device.type != "cuda":
        return WORKSPACE * 3 // 8
    free, _ = torch.cuda.mem_get_info(device)
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # cached by torch
    return share_room(free + unused - spared)


def share_room(free: float) -> int:
    """Return the bytes of matrices that a GPU may hold: half of its free memory, at least as many as on a CPU."""
    return max(WORKSPACE * 3 // 8, int(free // 2))


class Memory:
    """Allocates matrices on a device until its share of the workspace is used up, then elsewhere.

    For a GPU that is the host's memory. For a CPU it is an unlinked file in the folder for temporary files, mapped into
    memory, whose pages the system can write out and evict.

    The host computes with the matrices of a device that has no float64.

    Args:
        device: device whose tensors are added to the matrices.

    Attributes:
        device: device that computes with the matrices.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = find_double_device(device)
        self._left = find_room(self.device)

    def make_zeros(self, rows: int, columns: int, dtype: torch.dtype = torch.float64) -> Tensor:
        """Allocate a matrix of zeros, `[rows, columns]`.

        Raises:
            ValueError: if the disk has too little space.
        """
        size = rows * columns * dtype.itemsize
        if size <= self._left:
            self._left -= size
            return torch.zeros(rows, columns, dtype=dtype, device=self.device)
        if self.device.type != "cpu":
            return torch.zeros(rows, columns, dtype=dtype)
        with tempfile.NamedTemporaryFile(prefix="gqaprune-") as file:
            try:  # reserve the space: on a full disk, writing to mapped memory would kill the process
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(file.fileno(), 0, size)
                else:  # macOS
                    _fill_with_zeros(file, size)
            except OSError as error:
                raise ValueError(
                    f"{tempfile.gettempdir()} has no space for a Gram matrix of {size / 1e6:,.0f} MB "
                    f"({error.strerror}); set TMPDIR to a folder on a larger disk"
                ) from error
            return torch.from_file(file.name, shared=True, size=rows * columns, dtype=dtype).view(rows, columns)


def _fill_with_zeros(file: IO[bytes], size: int) -> None:
    zeros = bytes(2**20)
    for start in range(0, size, len(zeros)):
        file.write(zeros[: size - start])
    file.flush()


def chunk_rows(rows: int, columns: int) -> list[slice]:
    """Split a matrix into chunks of consecutive rows: as many as fit an eighth of the workspace in float64, or one."""
    step = max(1, WORKSPACE // 8 // (8 * max(1, columns)))
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def count_panel_bytes(size: int) -> int:
    """Count the bytes of all panels of a matrix with `size` rows."""
    elements: int = sum((rows.stop - rows.start) * rows.stop for rows in chunk_rows(size, size))
    return 8 * elements


class Panels:
    """A symmetric or lower triangular float64 matrix, initially zero.

    Args:
        size: number of rows and of columns.
        memory: where the panels are kept.
    """

    def __init__(self, size: int, memory: Memory) -> None:
        self.size, self.device = size, memory.device
        self.slices = chunk_rows(size, size)
        self.panels = [memory.make_zeros(rows.stop - rows.start, rows.stop) for rows in self.slices]

    def read(self, index: int) -> Tensor:
        """Return a panel on the device, copied if it is kept elsewhere."""
        return self.panels[index].to(self.device)

    def get_diagonal(self) -> Tensor:
        """Return a copy of the diagonal on the device, `[S]`."""
        diagonals = [
            panel[:, rows].diagonal().to(self.device) for rows, panel in zip(self.slices, self.panels, strict=True)
        ]
        return torch.cat(diagonals)

    def to_dense(self) -> Tensor:
        """Return a copy of the whole symmetric matrix on the device, `[S, S]`."""
        dense_SS = torch.zeros(self.size, self.size, dtype=torch.float64, device=self.device)
        for index, rows in enumerate(self.slices):
            panel_PS = self.read(index)
            dense_SS[rows, : rows.stop] = panel_PS
            dense_SS[: rows.start, rows] = panel_PS[:, : rows.start].T
        return dense_SS

    def multiply(self, left_RS: Tensor) -> Tensor:
        """Compute `left · self`, `[R, S]`; self is symmetric."""
        product_RS = torch.zeros_like(left_RS)
        for index, rows in enumerate(self.slices):
            panel_PS = self.read(index)
            product_RS[:, : rows.stop].addmm_(left_RS[:, rows], panel_PS)
            product_RS[:, rows].addmm_(left_RS[:, : rows.start], panel_PS[:, : rows.start].T)
        return product_RS

    def factorise(self, summands: "Sequence[Panels]", penalty_S: Tensor) -> bool:
        """Overwrite self with the lower Cholesky factor of `Σ summands + diag(penalty)`, panel by panel.

        Args:
            summands: symmetric matrices of the same size; self may be the first.
            penalty_S: the diagonal to add.

        Returns:
            Whether the sum is positive definite; if not, self is left undefined.
        """
        for index, rows in enumerate(self.slices):
            panel_PS = summands[0].read(index).clone()
            for summand in summands[1:]:
                panel_PS += summand.read(index)
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
        """Solve `x · L · Lᵀ = right` in place; self is the factor `L`.

        If `right` has fewer columns, only the leading rows and columns of `L` are used: they are the factor of the
        leading part of the matrix.
        """
        size = right_RS.shape[1]
        slices = [slice(rows.start, min(rows.stop, size)) for rows in self.slices if rows.start < size]
        for index, rows in enumerate(slices):
            factor_PS, tile = self._read_leading(index, rows), right_RS[:, rows]
            tile.addmm_(right_RS[:, : rows.start], factor_PS[:, : rows.start].T, alpha=-1)
            tile.copy_(torch.linalg.solve_triangular(factor_PS[:, rows].T, tile, upper=True, left=False))
        for index, rows in reversed(list(enumerate(slices))):
            factor_PS, tile = self._read_leading(index, rows), right_RS[:, rows]
            tile.copy_(torch.linalg.solve_triangular(factor_PS[:, rows], tile, upper=False, left=False))
            right_RS[:, : rows.start].addmm_(tile, factor_PS[:, : rows.start], alpha=-1)

    def _read_leading(self, index: int, rows: slice) -> Tensor:
        """Return the leading rows and columns of a panel on the device."""
        return self.panels[index][: rows.stop - rows.start, : rows.stop].to(self.device)

    def invert_diagonal(self, width: int) -> Tensor:
        """Compute the blocks of `(L · Lᵀ)⁻¹` on its diagonal, `[blocks, width, width]`; self is the factor `L`.

        The columns of `L⁻¹` are solved for in chunks of whole blocks.
        """
        columns = chunk_rows(self.size, self.size)[0].stop
        step = max(1, min(COLUMNS, columns) // width) * width
        return torch.cat([self._invert(start, step, width) for start in range(0, self.size, step)])

    def _invert(self, begin: int, step: int, width: int) -> Tensor:
        """Compute the blocks of `step` columns from `begin` on. Rows of `L⁻¹` above `begin` are 0 in these columns."""
        end = min(begin + step, self.size)
        inverse_SC = torch.zeros(self.size - begin, end - begin, dtype=torch.float64, device=self.device)
        inverse_SC[: end - begin].fill_diagonal_(1.0)
        for index, rows in enumerate(self.slices):
            start = max(begin, rows.start)
            if start < rows.stop:
                factor_PS = self.read(index)[start - rows.start :]
                tile = inverse_SC[start - begin : rows.stop - begin]
                tile.addmm_(factor_PS[:, begin:start], inverse_SC[: start - begin], alpha=-1)
                tile.copy_(torch.linalg.solve_triangular(factor_PS[:, start:], tile, upper=False))
        if width == 1:
            return inverse_SC.square_().sum(0)[:, None, None]
        return torch.stack([block.T @ block for block in inverse_SC.split(width, dim=1)])


class Gram(Panels):
    """`Σ x xᵀ` over tokens: products are computed in float32 and summed in float64.

    Attributes:
        tokens: number of tokens, a scalar.
    """

    def __init__(self, size: int, memory: Memory) -> None:
        super().__init__(size, memory)
        self.tokens = torch.zeros((), dtype=torch.float64, device=memory.device)

    def add(self, x_NS: Tensor) -> None:
        """Add tokens, float32 `[N, S]`."""
        self.tokens += len(x_NS)
        for rows, panel_PS in zip(self.slices, self.panels, strict=True):
            panel_PS += (x_NS[:, rows].T @ x_NS[:, : rows.stop]).to(panel_PS.device)

    def sum_across_ranks(self) -> None:
        """Sum over all ranks; every rank gets the same bits."""
        add_across_ranks([self.tokens, *self.panels], self.device)

    def is_finite(self) -> bool:
        """Whether all elements are finite. The diagonal tells: no product is larger than both of its squares."""
        return bool(self.get_diagonal().isfinite().all())
