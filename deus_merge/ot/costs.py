"""Costs between the rows of two matrices, exact to a few units of rounding also where rows nearly agree.

Squared distances are computed by one matrix product, ``|x|² + |y|² - 2 x·y``, which loses all digits where x ≈ y: only
there, they are computed again from ``x - y``. A planted permutation therefore has cost 0 on its matches.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NoReturn

from ..core.errors import SolverError, nearest
from ..core.on_disk import matrix_on_disk
from .blocks import product_blocks, row_blocks
from .points import LazyPoints, Transformed, dense, norms_of, panels, parts, row_norms, taken

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import torch
    from torch import Tensor

    from .points import Points

#: Squared distances below this share of ``|x|² + |y|²`` are computed again, by dtype.
_CLOSE = {"torch.float32": 2.0**-7, "torch.float64": 2.0**-20}
#: Close pairs recomputed at once: bounds the (pairs, d) buffer.
_PAIRS = 2048
#: Entries from which on a disk is faster than computing a cost again.
_LARGE = 1 << 24
#: Elements of the differences of single pairs computed at once: 1 MiB of float32.
_DIFFERENCES = 1 << 18


#: The costs a recipe can name.
COSTS = ("euclidean", "sqeuclidean", "cosine")
#: The scalings a recipe can name.
COST_SCALES = ("none", "max", "median")


class PointCost:
    """The cost between the rows of two matrices, computed in row blocks: stored, in memory or on the disk, or computed
    again on every pass.

    Args:
        x, y: (n, d), (m, d), float32 or float64, finite: tensors, or points whose rows are made when they are needed.
        cost: ``euclidean`` ‖x_r - y_s‖₂, ``sqeuclidean`` its square, or ``cosine`` 1 - cos(x_r, y_s).
        unit: Scale rows to norm 1 first.
        cost_scale: Divide by the matrix's maximum or median; one of `COST_SCALES`.
        keep_points: False: `points` may be freed once the whole cost is in memory.

    Raises:
        SolverError: an unknown name, rows of different length, or values that are not finite or too large to square.
    """

    def __init__(
        self,
        x: Points,
        y: Points,
        *,
        cost: str = "euclidean",
        unit: bool = False,
        cost_scale: str = "none",
        keep_points: bool = True,
    ):
        for key, got, known in (("cost", cost, COSTS), ("cost_scale", cost_scale, COST_SCALES)):
            if got not in known:
                raise SolverError(f"unknown {key}", expected=" | ".join(known), got=got, hint=nearest(got, known))
        _check(x, y)
        self.name, self._cost_scale = cost, cost_scale
        self.shape, self.dtype, self.device = (len(x), len(y)), x.dtype, x.device
        if unit or cost == "cosine":
            x, y = unit_points(x), unit_points(y)
        self._points: tuple[Points, Points] | None = (x, y)
        centred, norms = _centred(x, y)
        self._centred: tuple[Points, Points] | None = centred
        self._norms = tuple(sizes.square() for sizes in norms)  # (n,), (m,)
        self._scale = None if cost_scale != "none" else 1.0
        self._keep_points, self._limit, self._disk = keep_points, math.inf, False
        self._lower = False  # whether entries may be too low, but not too high
        self._stored: dict[int, Tensor] = {}  # first row of a block -> the block
        self._used = 0  # bytes of those that are in memory
        self._exact: set[int] = set()  # first rows of the parts that have no close pairs

    @property
    def points(self) -> tuple[Tensor, Tensor]:
        """The rows as they are compared, (n, d) and (m, d), in memory."""
        x, y = self._rows
        return dense(x), dense(y)

    @property
    def _rows(self) -> tuple[Points, Points]:
        if self._points is None:
            raise SolverError("the points of this cost are gone", hint="keep_points=True keeps them")
        return self._points

    def keep(self, nbytes: float | None, disk: bool = False) -> None:
        """Store at most this many bytes of the cost in memory (None: all of it).

        Args:
            nbytes: The limit.
            disk: Whether to store the rest on the disk, if it is large and there is room; otherwise it is computed on
                each pass.
        """
        self._limit, self._disk = math.inf if nbytes is None else nbytes, disk
        if self._used > self._limit:
            self._stored.clear()
            self._used = 0

    @property
    def scale(self) -> float:
        """The number that the cost is divided by. Found once, in one pass over the cost or, for the median, a few."""
        if self._scale is None:
            size = _median(self._unscaled, self.dtype) if self._cost_scale == "median" else self._maximum()
            self._scale = size if size > 0 else 1.0
            for rows in self._stored.values():
                rows.div_(self._scale)
        return self._scale

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """The cost in row blocks, in order: (rows, (r, m)). Read only, and valid until the next one is requested,
        since blocks that are not stored share one buffer."""
        scale = self.scale
        for block, rows, new in self._unscaled():
            yield block, rows.div_(scale) if new and scale != 1 else rows

    def dense(self) -> Tensor:
        """The whole cost, (n, m), in one new tensor."""
        import torch

        self.keep(0)
        matrix = torch.empty(self.shape, dtype=self.dtype, device=self.device)  # (n, m)
        for block, rows in self.blocks():
            matrix[block] = rows
        return matrix

    def _unscaled(self) -> Iterator[tuple[slice, Tensor, bool]]:
        """Row blocks as they are stored, or new and not yet scaled: (rows, (r, m), whether they are new)."""
        scratch, missing = None, 0
        for block in self._row_blocks():
            rows = self._stored.get(block.start)
            new = rows is None
            if rows is None:
                count = block.stop - block.start
                rows = self._new_block(count)
                if rows is not None:
                    self._stored[block.start] = rows  # (r, m)
                else:
                    missing += count
                    scratch = self._norms[0].new_empty(count, self.shape[1]) if scratch is None else scratch[:count]
                    rows = scratch
                self._compute(block, rows)
            yield block, rows, new
        if not self._keep_points and not missing:
            self._points = self._centred = None

    def _new_block(self, count: int) -> Tensor | None:
        """A tensor (count, m) for a block to be stored in; None where there is room for none."""
        nbytes = count * self.shape[1] * self.dtype.itemsize
        if self._used + nbytes <= self._limit:
            self._used += nbytes
            return self._norms[0].new_empty(count, self.shape[1])
        large = self._disk and self.device.type == "cpu" and self.shape[0] * self.shape[1] >= _LARGE
        return matrix_on_disk(count, self.shape[1], self.dtype) if large else None

    def at(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Single entries of the cost from the differences of their points, added up in float64.

        Args:
            rows, columns: (q,) int64.

        Returns:
            (q,) float64.
        """
        return self._between(rows, columns).div_(self.scale)

    def _between(self, rows: Tensor, columns: Tensor) -> Tensor:
        """`at` before scaling."""
        import torch

        x, y = self._rows
        found = self._norms[0].new_empty(len(rows), dtype=torch.float64)  # (q,)
        some = list(row_blocks(len(rows), x.shape[1], max(_DIFFERENCES, 16 * x.shape[1])))
        most = max((part.stop - part.start for part in some), default=0)
        pair = self._norms[0].new_empty(2, most, x.shape[1])  # one memory for all parts stays in the cache
        for part in some:
            away, other = pair[:, : part.stop - part.start]  # (p, d) each
            away = taken(x, rows[part], away).sub_(taken(y, columns[part], other))
            found[part] = row_norms(away, torch.float64)
        return found if self.name == "euclidean" else found.square_().mul_(0.5 if self.name == "cosine" else 1)

    def _products(self, block: slice, out: Tensor) -> None:
        """The inner products of some rows of x with all of y, (r, m)."""
        import torch

        assert self._centred is not None, "freed only when all blocks are stored"
        x, y = self._centred
        rows = x[block]  # (r, d)
        for panel in panels(y):
            torch.mm(rows, y[panel].t(), out=out[:, panel])

    def _row_blocks(self) -> Iterator[slice]:
        """The blocks of rows that are computed, stored and read as one."""
        return product_blocks(*self.shape)

    def _maximum(self) -> float:
        import torch

        return torch.stack([rows.max() for _, rows, _ in self._unscaled()]).max().item()

    def _compute(self, block: slice, cost: Tensor) -> None:
        """Write the rows of one block before scaling into ``cost``, (r, m)."""
        import torch

        assert self._points is not None, "freed only when all blocks are stored"
        x2, y2 = self._norms[0][block], self._norms[1]  # (r,), (m,)
        self._products(block, cost)
        close, largest = _CLOSE[str(self.dtype)], y2.max()
        for part in row_blocks(*cost.shape):
            rows, first = cost[part], block.start + part.start  # (p, m)
            scale = x2[part].unsqueeze(1) + y2  # (p, m)
            torch.sub(scale, rows, alpha=2, out=rows).clamp_min_(0)
            if first not in self._exact:  # what was read once is not read from the device again
                if bool((rows.amin(1) < close * (x2[part] + largest)).any()):
                    _recompute_close(rows, self._points[0][block][part], self._points[1], scale, self._lower)
                else:
                    self._exact.add(first)
            if self.name == "euclidean":
                rows.sqrt_()
            elif self.name == "cosine":
                rows.mul_(0.5)


def _recompute_close(rows: Tensor, x: Tensor, y: Points, scale: Tensor, lower: bool) -> None:
    """Squared distances far below ``|x|² + |y|²`` again, or lower bounds of them; ``rows`` and ``scale`` (p, m)."""
    few = 4 * max(rows.shape)
    pairs = (rows < _CLOSE[str(x.dtype)] * scale).nonzero()  # (q, 2)
    if len(pairs) > few:  # many rows alike: one product in float64 is cheaper, and leaves few or exact copies
        for panel in panels(y):
            found = _sqeuclidean_float64(x.double(), y[panel].double())  # (p, r)
            if lower:
                found.sub_(scale[:, panel], alpha=2.0**-52 * x.shape[1]).clamp_min_(0)
            rows[:, panel] = found
        pairs = (rows < 2.0**-36 * scale).nonzero()
        if len(pairs) > few:
            return
    for part in pairs.split(_PAIRS):
        r, s = part.unbind(1)
        rows[r, s] = (x[r] - y[s]).square_().sum(1)


def _median(blocks: Callable[[], Iterator[tuple[slice, Tensor, bool]]], dtype: torch.dtype) -> float:
    """The lower median of non-negative floats, found by their bits, 16 of them a pass."""
    import torch

    kind, width = (torch.int32, 32) if dtype == torch.float32 else (torch.int64, 64)
    prefix, wanted = 0, -1  # the bits known so far; how many numbers that have them are below the median
    for shift in range(width - 16, -1, -16):
        counts = None
        for _, rows, _ in blocks():
            bits = rows.flatten().view(kind)  # integers in the order of the floats
            if shift + 16 < width:
                bits = bits[(bits >> (shift + 16)) == prefix]
            more = torch.bincount((bits >> shift) & 0xFFFF, minlength=1 << 16)  # (2 ** 16,)
            counts = more if counts is None else counts + more
        assert counts is not None, "a cost has rows"
        up_to = counts.cumsum(0).cpu()
        if wanted < 0:
            wanted = (int(up_to[-1]) - 1) // 2
        digit = int((up_to <= wanted).sum())
        wanted -= int(up_to[digit - 1]) if digit else 0
        prefix = prefix << 16 | digit
    return torch.tensor(prefix, dtype=kind).view(dtype).item()


def cost_matrix(
    x: Tensor, y: Tensor, *, cost: str = "euclidean", unit: bool = False, cost_scale: str = "none"
) -> Tensor:
    """The cost a recipe asks for, (n, d), (m, d) -> (n, m); see `PointCost` for the arguments."""
    return PointCost(x, y, cost=cost, unit=unit, cost_scale=cost_scale).dense()


def unit_rows(x: Tensor) -> Tensor:
    """Rows scaled to norm 1; zero rows stay zero. (n, d) -> (n, d)"""
    return x / _divisors(x)


def unit_points(x: Points) -> Points:
    """`unit_rows` of points of any kind."""
    return Transformed(x, sizes=_divisors(x)) if isinstance(x, LazyPoints) else unit_rows(x)


def _divisors(x: Points) -> Tensor:
    """Norms of rows, or 1 where they are 0; (n, 1)."""
    norm = norms_of(x).unsqueeze(1)  # (n, 1)
    return norm.where(norm > 0, 1)


def _centred(x: Points, y: Points) -> tuple[tuple[Points, Points], tuple[Tensor, Tensor]]:
    """Both without their common offset, which costs digits, as they are where it is small; and their rows' norms, (n,)
    and (m,).

    Raises:
        SolverError: values that are not finite, or too large to square.
    """
    import torch

    norms = norms_of(x), norms_of(y)
    mean = ((_mean(x) + _mean(y)) / 2).to(x.dtype)  # (d,)
    rms = [sizes.double().square().mean().sqrt() for sizes in norms]  # root mean square norms of rows
    largest = [sizes.max().double() for sizes in norms]
    offset, *sizes = torch.stack([mean.norm().double(), *rms, *largest]).tolist()
    if math.isfinite(sum(sizes)) and offset >= 0.5 * min(sizes[:2]):
        x, y = (Transformed(p, offset=mean) if isinstance(p, LazyPoints) else p - mean for p in (x, y))
        norms = norms_of(x), norms_of(y)
        sizes[2:] = torch.stack([sizes.max() for sizes in norms]).tolist()
    # 4 times: the largest sum that is computed. Neither NaN nor infinity passes.
    if not all(4 * size * size <= torch.finfo(x.dtype).max for size in sizes[2:]):
        _refuse(x, y)
    return (x, y), norms


def _mean(points: Points) -> Tensor:
    """(d,) float64"""
    import torch

    total = torch.zeros(points.shape[1], dtype=torch.float64, device=points.device)
    for _, rows in parts(points):
        total += rows.sum(0, dtype=torch.float64)
    return total / len(points)


def _refuse(x: Points, y: Points) -> NoReturn:
    """Say why norms are not finite."""
    import torch

    most = torch.stack([rows.abs().max() for points in (x, y) for _, rows in parts(points)]).max().item()
    if not math.isfinite(most):
        raise SolverError(
            "the cost is not finite",
            expected="finite weights",
            got="NaN or infinity",
            hint="look for broken weights",
        )
    raise SolverError(
        f"the cost overflows {str(x.dtype).removeprefix('torch.')}",
        expected="distances whose square is a finite number",
        got=f"values up to {most:.3g}",
        hint="set unit_rows: true, or compute_dtype: float64; or correct the checkpoint",
    )


def _sqeuclidean_float64(x: Tensor, y: Tensor) -> Tensor:
    cost = (x @ y.t()).mul_(-2)  # (n, m)
    return cost.add_(x.square().sum(1, keepdim=True)).add_(y.square().sum(1)).clamp_min_(0)


def _check(x: Points, y: Points) -> None:
    if len(x.shape) != 2 or len(y.shape) != 2 or x.shape[1] != y.shape[1]:
        raise SolverError("rows of different length", got=f"{tuple(x.shape)} and {tuple(y.shape)}")
    if x.dtype != y.dtype or str(x.dtype) not in _CLOSE:
        raise SolverError("costs are computed in float32 or float64", got=f"{x.dtype} and {y.dtype}")
