"""A symmetric matrix of which only the lower triangle is kept, as blocks of rows, and its Cholesky factor in its place.

It takes half the memory of the whole matrix, and nothing besides it is as large: no copy, no work space.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor

ROWS = 512  # of a block


class Triangle:
    """A symmetric matrix (n, n) in float64.

    Args:
        size: n.
        device: Where it is.

    Attributes:
        size: n.
        blocks: Rows ``start`` to ``stop``, each (stop - start, stop): all columns up to the end of the diagonal block.
            After `factorise` the factor L, with L L^T the matrix.
    """

    def __init__(self, size: int, device: torch.device | str = "cpu"):
        import torch

        settings: Any = {"dtype": torch.float64, "device": device}
        self.size = size
        self._starts = tuple(range(0, size, ROWS))
        self.blocks = [
            torch.zeros((min(ROWS, size - start), min(start + ROWS, size)), **settings) for start in self._starts
        ]

    def add_products(self, values: Tensor) -> None:
        """Add values^T values, computed in the dtype of the values, which are (t, n)."""
        for start, stop, block in self._rows():
            block += values[:, start:stop].T @ values[:, :stop]

    def diagonal(self) -> Tensor:
        """The diagonal, (n,)."""
        import torch

        return torch.cat([block[:, start:].diagonal() for start, _, block in self._rows()])

    def lower(self) -> Tensor:
        """The lower triangle as a whole matrix, with zeros above it: (n, n)."""
        import torch

        found = self.blocks[0].new_zeros((self.size, self.size))
        for start, stop, block in self._rows():
            found[start:stop, :stop] = block
        return torch.tril(found)

    def scale(self, factor: float) -> None:
        """Multiply the matrix by a number, in place."""
        for block in self.blocks:
            block *= factor

    def damp(self, damping: float) -> float:
        """Add a multiple of the mean diagonal entry to the diagonal, in place. A matrix of zeros becomes the identity.

        Returns:
            What was added.
        """
        mean = float(self.diagonal().mean())
        added = damping * mean if mean > 0 else 1.0
        for start, _, block in self._rows():
            block[:, start:].diagonal().add_(added)
        return added

    def factorise(self) -> None:
        """Put the Cholesky factor in the place of the matrix.

        Reference: Golub and Van Loan, Matrix Computations, 4th edition, section 4.2.9, by rows of blocks.

        Raises:
            ArithmeticError: the matrix is not positive definite.
        """
        import torch

        for i, (start, _, block) in enumerate(self._rows()):
            for at, to, above in self._rows(i):
                part = block[:, at:to]  # (r, c)
                part -= block[:, :at] @ above[:, :at].T
                part.copy_(_divided(part, above[:, at:], transposed=True))
            part = block[:, start:]  # (r, r)
            part -= block[:, :start] @ block[:, :start].T
            factor, info = torch.linalg.cholesky_ex(part)
            if int(info) or not bool(factor.isfinite().all()):
                raise ArithmeticError
            part.copy_(factor)

    def divide_by_transposed_factor(self, values: Tensor) -> None:
        """Replace values by values L^-T, in place: (k, n)."""
        for start, stop, block in self._rows():
            part = values[:, start:stop]
            part -= values[:, :start] @ block[:, :start].T
            part.copy_(_divided(part, block[:, start:], transposed=True))

    def divide_by_factor(self, values: Tensor) -> None:
        """Replace values by values L^-1, in place: (k, n)."""
        for start, stop, block in reversed(list(self._rows())):
            part = values[:, start:stop]
            part.copy_(_divided(part, block[:, start:], transposed=False))
            values[:, :start] -= part @ block[:, :start]

    def _rows(self, count: int | None = None) -> Iterator[tuple[int, int, Tensor]]:
        """Start, stop and rows of each block, or of the first ones."""
        for start, block in zip(self._starts[:count], self.blocks, strict=False):
            yield start, start + len(block), block


def _divided(values: Tensor, factor: Tensor, *, transposed: bool) -> Tensor:
    """values factor^-1, or values factor^-T; the factor is a lower triangle, (r, r)."""
    import torch

    triangle = factor.T if transposed else factor
    return torch.linalg.solve_triangular(triangle, values, upper=transposed, left=False)
