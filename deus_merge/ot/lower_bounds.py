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
from .points import PANEL_ROWS, parts, row_norms

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch
    from torch import Tensor

    from .points import Points

#: Elements of rows whose products are added up at once.
_TERMS = 4096
#: Bytes of rounded rows that are kept from one block to the next; more than that are rounded again.
KEPT = 1 << 30
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
        self._keep_points, self._used, self._stored, self._exact = True, 0, {}, set()
        assert self._centred is not None, "a cost that keeps its points"
        self._precision, width = precision, self._centred[0].shape[1]
        self._largest = 0.0  # that the absolute values of a product's parts add up to
        self._rounded: dict[int, Tensor] = {}  # first row of a panel of y -> the panel
        self._room = self.shape[1] * width * precision.itemsize <= KEPT
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

    def _row_blocks(self) -> Iterator[slice]:
        """Blocks of so many rows that it does not matter how long it takes to make and to round those of y."""
        return row_blocks(self.shape[0], 1, PANEL_ROWS * (1 if self._room else 2))

    def _products(self, block: slice, out: Tensor) -> None:
        """Upper bounds of the inner products."""
        import torch

        assert self._centred is not None, "freed only when all blocks are stored"
        x = _rounded(self._centred[0], block, self._precision)  # (r, d)
        half = torch.finfo(self._precision).eps / 2
        for panel in row_blocks(self.shape[1], 1, PANEL_ROWS):
            y = self._panel(panel)  # (p, d)
            upper, largest = out[:, panel].zero_(), 0.0  # (r, p)
            for part in self._parts:
                if self._low:
                    found = x[:, part] @ y[:, part].t()  # (r, p)
                    for rows in row_blocks(*found.shape):
                        upper[rows] += found[rows]
                        upper[rows].add_(found[rows].abs_(), alpha=half * (1 + 2 * half))
                    largest += float(found.max())
                else:
                    upper.addmm_(x[:, part], y[:, part].t())
            self._largest = max(self._largest, largest)
        sizes = [norms.sqrt() for norms in (self._norms[0][block], self._norms[1])]  # (r,), (m,)
        out.addr_(*sizes, alpha=self._relative)

    def _panel(self, panel: slice) -> Tensor:
        """Some rows of y in the precision of products."""
        assert self._centred is not None, "freed only when all blocks are stored"
        rows = self._rounded.get(panel.start)
        if rows is None:
            rows = _rounded(self._centred[1], panel, self._precision)
            if self._room:
                self._rounded[panel.start] = rows
        return rows

    def _maximum(self) -> float:
        """The largest entry itself, among those that can be it: whose upper bound is above one that is known."""
        import torch

        highest = []  # () of each block
        for block, rows, _ in self._unscaled():
            highest.append(rows.argmax() + block.start * self.shape[1])
        places = torch.stack(highest)
        found, count = self._between(places // self.shape[1], places % self.shape[1]).max().item(), 0
        # squared distances are above squared bounds by at most this
        norms = math.prod(norms.max().sqrt().item() for norms in self._norms)
        margin = 4 * (self._relative * norms + torch.finfo(self._precision).eps * self._largest)
        power, factor = {"euclidean": (2, 1), "sqeuclidean": (1, 1), "cosine": (1, 2)}[self.name]
        least = max(0.0, factor * found**power - margin) ** (1 / power) / factor
        for block, rows, _ in self._unscaled():
            r, s = (rows >= least).nonzero().unbind(1)
            count += len(r)
            if count > _TIED * self.shape[0] * self.shape[1]:
                self._source.keep(0)
                return self._source._maximum()
            if len(r):
                found = max(found, self._between(r + block.start, s).max().item())
        return found


def _rounded(points: Points, which: slice, precision: torch.dtype) -> Tensor:
    """Some rows in another precision, (r, d), a few of them at a time."""
    import torch

    if isinstance(points, torch.Tensor) and points.dtype == precision:
        return points[which]
    count, width = which.stop - which.start, points.shape[1]
    rounded = torch.empty(count, width, dtype=precision, device=points.device)
    for part in row_blocks(count, width):
        rounded[part] = points[which.start + part.start : which.start + part.stop]
    return rounded


def _relative_rounding(points: Points, precision: torch.dtype) -> float:
    """The largest distance of a row to its rounded self, over its norm; (n, d)."""
    largest = 0.0
    for _, rows in parts(points):  # (r, d)
        norms = row_norms(rows)  # (r,)
        away = row_norms(rows - rows.to(precision))
        largest = max(largest, float((away / norms.where(norms > 0, 1)).max()))
    return largest * (1 + 2.0**-10)  # the norms themselves are rounded


def fast_precision(cost: PointCost) -> torch.dtype | None:
    """A precision in which products of this cost's rows take less time on its device; None where none is known to."""
    import torch

    if cost.device.type != "cpu" or cost.dtype != torch.float32 or cost.shape[0] * cost.shape[1] < 1 << 22:
        return None
    features = getattr(torch.cpu, "get_capabilities", dict)()
    return torch.bfloat16 if features.get("amx_bf16") or features.get("avx512_bf16") else None
