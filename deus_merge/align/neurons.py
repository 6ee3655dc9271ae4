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
        factor: Of its columns, (d,) or (): the input norm, which is folded in; None for none.
        plan: The map that brings the weight's columns into B's order; None for weights that are in it.
        follows: What is applied to its outputs, in order: factors (n, 1), and biases (n,), which become one more
            column.
    """

    def __init__(
        self,
        weight: Tensor,
        dtype: torch.dtype,
        factor: Tensor | None = None,
        plan: RowMap | None = None,
        follows: Sequence[Tensor] = (),
    ):
        biases = sum(vector.ndim == 1 for vector in follows)
        self.shape, self.dtype, self.device = (len(weight), weight.shape[1] + biases), dtype, weight.device
        self._weight, self._factor, self._plan, self._follows = weight, factor, plan, follows

    def over(self, size: Tensor) -> Folded:
        """The same divided by a number, ()."""
        factor = 1 / size if self._factor is None else self._factor / size
        follows = [vector if vector.ndim == 2 else vector / size for vector in self._follows]
        return Folded(self._weight, self.dtype, factor, self._plan, follows)

    def __getitem__(self, which: slice | Tensor) -> Tensor:
        import torch

        rows = self._weight[which].to(self.dtype, copy=isinstance(which, slice))  # (r, d), never the weight itself
        if self._factor is not None:
            rows.mul_(self._factor)
        if self._plan is not None:
            rows = self._plan.to_columns(rows)
        for vector in self._follows:
            some = vector[which]
            rows = rows * some if vector.ndim == 2 else torch.cat((rows, some.unsqueeze(1)), dim=1)
        return rows


class Neurons(LazyPoints):
    """The neurons of one side, (f, e): every weight that writes or reads them, side by side.

    Args:
        weights: (f, d) each.
    """

    def __init__(self, weights: Sequence[Folded]):
        first = weights[0]
        self.shape = len(first), sum(weight.shape[1] for weight in weights)
        self.dtype, self.device = first.dtype, first.device
        self._weights = weights

    def __getitem__(self, which: slice | Tensor) -> Tensor:
        import torch

        return torch.cat([weight[which] for weight in self._weights], dim=1)


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
