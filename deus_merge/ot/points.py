"""Points whose rows are made when they are asked for, so that a matrix of all of them need not be in memory.

Whatever takes `Points` uses no more of a matrix than ``points[a_slice]``, ``points[indices]``, its shape, dtype and
device: a tensor (n, d) is one kind of points.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, TypeAlias

from .blocks import row_blocks

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch
    from torch import Tensor

    Points: TypeAlias = "Tensor | LazyPoints"

#: Rows of points that are made and multiplied at once.
PANEL_ROWS = 2048


class LazyPoints(ABC):
    """A matrix (n, d) that gives rows on demand: the same numbers every time, however many are asked for at once.

    Attributes:
        shape: (n, d).
        dtype: float32 or float64.
        device: Where rows are made.
    """

    shape: tuple[int, int]
    dtype: torch.dtype
    device: torch.device

    @abstractmethod
    def __getitem__(self, which: slice | Tensor) -> Tensor:
        """Some rows in a new tensor, (r, d).

        Args:
            which: A slice, or int64 indices (r,).
        """

    def __len__(self) -> int:
        return self.shape[0]


class Transformed(LazyPoints):
    """Rows divided by numbers of their own, or less a common row.

    Args:
        points: The rows before; lazy ones, too.
        sizes: (n, 1) to divide by.
        offset: (d,) to subtract.
    """

    def __init__(self, points: LazyPoints, *, sizes: Tensor | None = None, offset: Tensor | None = None):
        self.shape, self.dtype, self.device = points.shape, points.dtype, points.device
        self._points, self._sizes, self._offset = points, sizes, offset

    def __getitem__(self, which: slice | Tensor) -> Tensor:
        rows = self._points[which]  # (r, d)
        if self._sizes is not None:
            rows.div_(self._sizes[which])
        return rows if self._offset is None else rows.sub_(self._offset)


def dense(points: Points) -> Tensor:
    """All rows in one tensor, (n, d)."""
    import torch

    if isinstance(points, torch.Tensor):
        return points
    whole = torch.empty(points.shape, dtype=points.dtype, device=points.device)  # (n, d)
    for part, rows in parts(points):
        whole[part] = rows
    return whole


def parts(points: Points) -> Iterator[tuple[slice, Tensor]]:
    """All rows, some at a time: (rows, (r, d))."""
    for part in row_blocks(*points.shape):
        yield part, points[part]


def panels(points: Points) -> Iterator[slice]:
    """The rows that are multiplied at once, `PANEL_ROWS` of them."""
    return row_blocks(len(points), 1, PANEL_ROWS)


def norms_of(points: Points) -> Tensor:
    """Euclidean norms of all rows, (n,)."""
    import torch

    # Not a list of them: small results among large temporary ones keep the memory of these from being used again.
    norms = torch.empty(len(points), dtype=points.dtype, device=points.device)
    for part, rows in parts(points):
        norms[part] = row_norms(rows)
    return norms


def row_norms(rows: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Euclidean norms of rows, (r, d) -> (r,), added up in a dtype; each is independent of the others. (Torch sums a
    matrix of a single row by several threads, in an order that depends on their number.)"""
    import torch

    norms = torch.linalg.vector_norm(rows if len(rows) != 1 else torch.cat((rows, rows)), dim=1, dtype=dtype)
    return norms[: len(rows)]


def taken(points: Points, which: Tensor, out: Tensor) -> Tensor:
    """Some rows, (r,) -> (r, d), those of a tensor in ``out``. Equal neighbours are made once."""
    import torch

    if isinstance(points, torch.Tensor):
        return torch.index_select(points, 0, which, out=out)
    once, places = which.unique_consecutive(return_inverse=True)
    return points[once][places]
