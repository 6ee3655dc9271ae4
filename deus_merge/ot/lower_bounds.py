"""Lower bounds of a cost, close to it, from fast products: with them an exact solver finds the few edges that matter,
and computes only their costs exactly. How close they are is proved in `products`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .blocks import row_blocks
from .costs import PointCost
from .products import fast_precisions, products

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch
    from torch import Tensor

#: Bounds are tight whose products are on average off by less than this, as a share of their rows' norms.
_TIGHT = 0.005
#: Entries from which fast products save time.
_MANY = 1 << 20
#: More candidates for the largest cost than this share of all entries: ties, which no bound tells apart.
_TIED = 2.0**-8
#: Of each cost, the power and the factor that make it a squared distance.
_SQUARED = {"euclidean": (2, 1), "sqeuclidean": (1, 1), "cosine": (1, 2)}


class LowerBounds(PointCost):
    """Numbers that are at most the entries of a cost, by about rounding; `at` gives the entries themselves.

    Args:
        cost: Keeps its points. Its blocks are not read, unless it is divided by its median.
        precision: Of the products, ``torch.int8``, ``torch.bfloat16`` or the cost's own dtype.
    """

    def __init__(self, cost: PointCost, precision: torch.dtype):
        vars(self).update(vars(cost))
        self._source, self._keep_points, self._used, self._stored, self._exact = cost, True, 0, {}, set()
        assert self._centred is not None, "a cost that keeps its points"
        self._lower, self._fast = True, products(*self._centred, precision)
        self._norms = tuple(norms.square() for norms in self._fast.norms)

    @property
    def tight(self) -> bool:
        """Whether few edges are open: their bounds are nearly the costs."""
        return self._fast.error < _TIGHT

    @property
    def scale(self) -> float:
        if self._scale is None and self._cost_scale == "median":
            self._scale = self._source.scale
            self._source.keep(0)
        return super().scale

    def estimates(self, rows: Tensor, columns: Tensor, bounds: Tensor) -> Tensor:
        """What entries probably are, by their bounds; (q,) each, float64."""
        power, factor = _SQUARED[self.name]
        error = (self._fast.left[rows] * self._fast.right[:, columns].t()).sum(1).double()  # (q,)
        squared = factor * (bounds * self.scale) ** power + 2 * error
        return squared ** (1 / power) / (factor * self.scale)

    def _row_blocks(self) -> Iterator[slice]:
        return self._fast.blocks()

    def _products(self, block: slice, out: Tensor) -> None:
        """Upper bounds of the inner products."""
        self._fast.upper(block, out)

    def _maximum(self) -> float:
        """The largest entry itself, among those that can be it: whose upper bound is above one that is known."""
        import torch

        highest = []  # () of each block
        for block, rows, _ in self._unscaled():
            highest.append(rows.argmax() + block.start * self.shape[1])
        places = torch.stack(highest)
        found, count = self._between(places // self.shape[1], places % self.shape[1]).max().item(), 0
        power, factor = _SQUARED[self.name]
        least = factor * found**power - 4 * self._fast.slack
        for block, whole, _ in self._unscaled():
            for part in row_blocks(*whole.shape):
                start = block.start + part.start
                squared = whole[part].pow(power).mul_(factor)  # (r, m)
                # Squared distances are above their bounds by at most four times a product's error.
                squared.addmm_(self._fast.left[start : start + len(squared)], self._fast.right, alpha=4)
                r, s = (squared >= least).nonzero().unbind(1)
                count += len(r)
                if count > _TIED * self.shape[0] * self.shape[1]:
                    self._source.keep(0)
                    return self._source._maximum()
                if len(r):
                    found = max(found, self._between(r + start, s).max().item())
        return found


def fast_bounds(cost: PointCost) -> LowerBounds | None:
    """The bounds of a cost that take the least time on its device, if they are tight; None where none are known."""
    if cost.shape[0] * cost.shape[1] >= _MANY:
        for precision in fast_precisions(cost._rows[0]):
            bounds = LowerBounds(cost, precision)
            if bounds.tight:
                return bounds
    return None
