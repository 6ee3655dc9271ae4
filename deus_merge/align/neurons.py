"""The rows that alignment compares, made of stored weights when they are asked for.

A layer of a large model has gigabytes of them in the dtype of the arithmetic, and twice that for two layers. Only the
weights themselves are held, as they are stored: mapped from their files, as far as they are not turned over.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..ot.blocks import row_blocks
from ..ot.points import LazyPoints, norms_of

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ..ot.coupling import RowMap

#: elements of a weight that are turned over at once: they fit in the cache
_TURNED = 1 << 18


class Folded(LazyPoints):
    """A weight as it acts on the normed input.

    Args:
        weight: (n, d), as stored.
        dtype: Of the arithmetic.
        norm: (d,) the input norm, which is folded in; None for none.
        plan: The map that brings the weight's columns into B's order; None for weights that are in it.
        follows: What is applied to its outputs, in order: factors (n, 1), and biases (n,), which become one more
            column.
    """

    def __init__(
        self,
        weight: Tensor,
        dtype: torch.dtype,
        norm: Tensor | None = None,
        plan: RowMap | None = None,
        follows: Sequence[Tensor] = (),
    ):
        biases = sum(vector.ndim == 1 for vector in follows)
        self.shape, self.dtype, self.device = (len(weight), weight.shape[1] + biases), dtype, weight.device
        self._weight, self._norm, self._plan, self._follows = weight, norm, plan, follows

    def __getitem__(self, which: slice | Tensor) -> Tensor:
        import torch

        rows = self._weight[which].to(self.dtype, copy=isinstance(which, slice))  # (r, d), never the weight itself
        if self._norm is not None:
            rows = rows * self._norm
        if self._plan is not None:
            rows = self._plan.to_columns(rows)
        for vector in self._follows:
            some = vector[which]
            rows = rows * some if vector.ndim == 2 else torch.cat((rows, some.unsqueeze(1)), dim=1)
        return rows


class Neurons(LazyPoints):
    """The neurons of one side, (f, e): every weight that writes or reads them, side by side, each over a number.

    Args:
        weights: (f, d) each.
        sizes: The number that each is divided by, () each.
    """

    def __init__(self, weights: Sequence[LazyPoints], sizes: Sequence[Tensor]):
        first = weights[0]
        self.shape = len(first), sum(weight.shape[1] for weight in weights)
        self.dtype, self.device = first.dtype, first.device
        self._weights, self._sizes = weights, sizes

    def __getitem__(self, which: slice | Tensor) -> Tensor:
        import torch

        count = len(range(*which.indices(len(self)))) if isinstance(which, slice) else len(which)
        rows = torch.empty(count, self.shape[1], dtype=self.dtype, device=self.device)  # (r, e)
        at = 0
        for weight, size in zip(self._weights, self._sizes, strict=True):
            torch.div(weight[which], size, out=rows[:, at : at + weight.shape[1]])
            at += weight.shape[1]
        return rows


def mean_size(a: LazyPoints, b: LazyPoints) -> Tensor:
    """The mean norm of the rows of both, or 1 where all are zero; ()."""
    mean = (norms_of(a).mean() + norms_of(b).mean()) / 2
    return mean.where(mean > 0, 1)


def turned(weight: Tensor) -> Tensor:
    """The columns of a weight as rows, (d, f) -> (f, d), in its own dtype."""
    rows = weight.new_empty(weight.shape[1], weight.shape[0])
    columns = weight.t()
    for part in row_blocks(*rows.shape, elements=_TURNED):
        rows[part] = columns[part]
    return rows
