"""Lower bounds of a cost, close to it, from products in a fast precision: with them an exact solver finds the few edges
that matter, and computes only their costs exactly.

With rows x, y of d elements that are rounded to x̂, ŷ, and the product s that a processor finds in float32,

    |x·y - s| ≤ (r + r' + r r' + k u) |x| |y|,    r = max |x - x̂| / |x|,  r' likewise,  u = 2⁻²⁴,

by the triangle and Cauchy-Schwarz inequalities and the usual bound of a sum's rounding (Higham 2002, Accuracy and
Stability of Numerical Algorithms, 3.1). Sums of `_TERMS` elements are made first and then added up: k is about `_TERMS`
plus d / `_TERMS`. Where these come back in bfloat16, each adds 2⁻⁹ of its absolute value. Nothing is estimated: what
follows from the bounds is proved.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from .blocks import row_blocks
from .costs import PointCost

if TYPE_CHECKING:
    import torch
    from torch import Tensor

#: Elements of rows whose products are added up at once.
_TERMS = 4096
#: More candidates for the largest cost than this share of all entries: ties, which no bound tells apart.
_TIED = 2.0**-8


class LowerBounds(PointCost):
    """Numbers that are at most the entries of a cost, by about rounding; `at` gives the entries themselves.

    Args:
        cost: Keeps its points. Its blocks are not read, unless it is divided by its median.
        precision: Of the products, ``torch.bfloat16`` or the cost's own dtype.
    """

    def __init__(self, cost: PointCost, precision: torch.dtype):
        import torch

        vars(self).update(vars(cost))
        self._source, self._low = cost, precision != cost.dtype
        self._keep_points, self._stored, self._exact = True, {}, set()
        self._precision, self._rounded, self._buffer = precision, None, None
        assert self._centred is not None, "a cost that keeps its points"
        width = self._centred[0].shape[1]
        self._parts = [slice(at, min(at + _TERMS, width)) for at in range(0, width, _TERMS)]
        terms = min(width, _TERMS) + len(self._parts) + 8  # 8: the other steps to a squared distance
        self._relative = terms * torch.finfo(cost.dtype).eps / 2
        if self._low:
            x, y = (_relative_rounding(points, precision) for points in self._centred)
            self._relative += x + y + x * y

    @property
    def scale(self) -> float:
        if self._scale is None and self._cost_scale == "median":
            self._scale = self._source.scale
            self._source.keep(0)
        return super().scale

    def _products(self, block: slice, out: Tensor) -> None:
        """Upper bounds of the inner products."""
        import torch

        assert self._centred is not None, "freed only when all blocks are stored"
        x, y = self._centred[0][block], self._centred[1]  # (r, d), (m, d)
        out.zero_()
        if self._low:
            if self._rounded is None:
                self._rounded = y.to(self._precision)
                self._buffer = out.new_empty(out.shape, dtype=self._precision)
            assert self._buffer is not None, "made with the rounded rows"
            x, half = x.to(self._precision), torch.finfo(self._precision).eps / 2
            for part in self._parts:
                found = torch.mm(x[:, part], self._rounded[:, part].t(), out=self._buffer[: len(x)])  # (r, m)
                for rows in row_blocks(*out.shape):
                    out[rows] += found[rows]
                    out[rows].add_(found[rows].abs(), alpha=half * (1 + 2 * half))
        else:
            for part in self._parts:
                out.addmm_(x[:, part], y[:, part].t())
        sizes = [norms.sqrt() for norms in (self._norms[0][block], self._norms[1])]  # (r,), (m,)
        out.addr_(*sizes, alpha=self._relative)

    def _maximum(self) -> float:
        """The largest entry itself, among those that can be it."""
        import torch

        top = torch.stack([rows.max() for _, rows, _ in self._unscaled()]).max().item()
        # squared distances are above squared bounds by at most this; parts' sizes have products of at most the whole's
        stored = torch.finfo(self._precision).eps if self._low else 0.0
        largest = math.prod(norms.max().sqrt().item() for norms in self._norms)
        margin = 4 * (self._relative + stored) * largest
        power, factor = {"euclidean": (2, 1), "sqeuclidean": (1, 1), "cosine": (1, 2)}[self.name]
        least = max(0.0, factor * top**power - margin) ** (1 / power) / factor
        found, count = top, 0
        for block, rows, _ in self._unscaled():
            r, s = (rows >= least).nonzero().unbind(1)
            count += len(r)
            if count > _TIED * self.shape[0] * self.shape[1]:
                self._source.keep(0)
                return self._source._maximum()
            if len(r):
                found = max(found, self._between(r + block.start, s).max().item())
        return found


def _relative_rounding(points: Tensor, precision: torch.dtype) -> float:
    """The largest distance of a row to its rounded self, over its norm; (n, d)."""
    largest = 0.0
    for part in row_blocks(*points.shape):
        rows = points[part]  # (r, d)
        norms = rows.norm(dim=1)  # (r,)
        away = (rows - rows.to(precision)).norm(dim=1)
        largest = max(largest, float((away / norms.where(norms > 0, 1)).max()))
    return largest * (1 + 2.0**-10)  # the norms themselves are rounded


def fast_precision(cost: PointCost) -> torch.dtype | None:
    """A precision in which products of this cost's rows take less time on its device; None where none is known to."""
    import torch

    if cost.device.type != "cpu" or cost.dtype != torch.float32 or cost.shape[0] * cost.shape[1] < 1 << 22:
        return None
    features = getattr(torch.cpu, "get_capabilities", dict)()
    return torch.bfloat16 if features.get("amx_bf16") or features.get("avx512_bf16") else None
