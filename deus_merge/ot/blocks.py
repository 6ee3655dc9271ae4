"""Matrices in row blocks: how they are cut, and sums over their columns."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from torch import Tensor

#: Elements of one row block in element-wise passes over an n x m matrix: 8 MiB of float32.
BLOCK_ELEMENTS = 1 << 21
#: Elements of one row block in matrix products: 32 MiB of float32.
PRODUCT_ELEMENTS = 1 << 23


def row_blocks(rows: int, columns: int, elements: int | None = None, multiple: int = 1) -> Iterator[slice]:
    """Slices that cut ``rows`` rows of ``columns`` elements into blocks of about ``elements`` (`BLOCK_ELEMENTS`), each
    but the last of a multiple of ``multiple`` rows."""
    elements = BLOCK_ELEMENTS if elements is None else elements
    step = max(1, elements // max(1, columns) // multiple) * multiple
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def product_blocks(rows: int, columns: int) -> Iterator[slice]:
    """`row_blocks` for matrix products. Stored and recomputed matrices use these same blocks, so that the memory limit
    of a run does not show in its bytes: also not through the blocks' addresses, which are multiples of 64 bytes in both
    cases (on some processors the library's products round differently elsewhere)."""
    return row_blocks(rows, columns, PRODUCT_ELEMENTS, multiple=16)


def matrix_blocks(matrix: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """The `product_blocks` of a stored matrix (n, m): (rows, (r, m))."""
    for block in product_blocks(matrix.shape[0], matrix.shape[1]):
        yield block, matrix[block]


class ColumnSums(NamedTuple):
    """Sums over the columns of a non-negative matrix, (m,) each: of x and of x log x."""

    mass: Tensor
    xlogx: Tensor

    def mean_support(self) -> tuple[Tensor, Tensor]:
        """The mean of exp(entropy of the normalised column), () float64; and whether all columns have mass, () bool,
        without which the mean is meaningless."""
        return _mean_support(self.mass.double(), self.xlogx.double()), (self.mass > 0).all()

    def mean_support_of_full(self) -> float:
        """The same mean over the columns that have mass; 0 if none has."""
        full = self.mass > 0  # (m,)
        mass, xlogx = self.mass[full].double(), self.xlogx[full].double()
        return _mean_support(mass, xlogx).item() if mass.numel() else 0.0


def column_sums(blocks: Iterable[Tensor]) -> ColumnSums:
    """The sums of a matrix that is given in row blocks (r, m). One pass, no (n, m) buffer."""
    sums = None
    for whole in blocks:
        for part in row_blocks(*whole.shape):
            x = whole[part]  # (r, m)
            mass, xlogx = x.sum(0), x.clamp_min(tiny(x)).log_().mul_(x).sum(0)  # (m,) each
            sums = ColumnSums(mass, xlogx) if sums is None else ColumnSums(sums.mass + mass, sums.xlogx + xlogx)
    assert sums is not None, "a matrix has rows"
    return sums


def effective_support(blocks: Iterable[Tensor]) -> float:
    """Mean over columns of exp(entropy of the normalised column) of a matrix given as row blocks (r, m).

    Columns without mass are left out.
    """
    import torch

    sums = column_sums(blocks)
    support, complete = torch.stack([x.double() for x in sums.mean_support()]).tolist()
    return support if complete else sums.mean_support_of_full()


def _mean_support(mass: Tensor, xlogx: Tensor) -> Tensor:
    import torch

    return torch.exp(mass.log() - xlogx / mass).mean()


def tiny(x: Tensor) -> float:
    """The smallest normal number of a tensor's dtype."""
    import torch

    return torch.finfo(x.dtype).tiny
