"""Upper bounds of inner products, close to them, from products in a fast arithmetic.

With rows x, y of d elements, their rounded ones x̂, ŷ, and the product s that the processor finds, each kind knows how
far s can be from x·y: an entry of ``left @ right``.

**Floats.** By the triangle and Cauchy-Schwarz inequalities and the usual bound of a sum's rounding (Higham 2002,
Accuracy and Stability of Numerical Algorithms, 3.1),

    |x·y - s| ≤ (r + r' + r r' + k u) |x| |y|,    r = max |x - x̂| / |x|,  r' likewise,  u = 2⁻²⁴.

Sums of `_TERMS` elements are made first and then added up: k is about `_TERMS` plus d / `_TERMS`. Where these come back
in bfloat16, each adds 2⁻⁹ of its absolute value.

**8-bit integers** with subtractive dither (Schuchman 1964): with a step t for each row and a random vector δ, uniform
in [0, 1)ᵈ, x̂ = t (⌊x / t + δ⌋ - δ + ½) differs from x by t e, where the elements of e are independent and uniform in
[-½, ½], whatever x is. Their sums are sub-Gaussian with their variance, a twelfth for each, so that

    |x·y - x̂·ŷ| = |(x - x̂)·y + x̂·(y - ŷ)| ≤ τ √(t² |y|² + t'² |x̂|²)

but for a probability of 2 exp(-6 τ²). One δ serves all x and another all y, since for each pair alone these are
independent. τ makes the sum of these probabilities over all pairs 10⁻¹², far below that of a fault of the machine. With
d this bound falls as the spread of random products does; that of floats does not. The integers' products are exact, and
the dither's are two matrix-vector products.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, NamedTuple

from .blocks import row_blocks
from .points import PANEL_ROWS, parts, row_norms

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import torch
    from torch import Tensor

    from .points import Points

#: Elements of rows whose products are added up at once.
_TERMS = 4096
#: Bytes of rounded rows that are kept from one block to the next; more than that are rounded again.
KEPT = 1 << 30
#: The probability that some bound of 8-bit products does not hold.
_FAILURE = 1e-12
#: Of the dither: no small number, with which somebody may have drawn the very weights.
_SEED = 0x2F5A_83D1_9C47_6E0B
#: Rows all shorter than this lose digits in bfloat16: processors take the smallest numbers for 0.
_SHORTEST = 1e-15
#: The largest integer that a row is scaled to: the dither adds less than one.
_STEPS = 126
#: Rounding to integers moves numbers by at most so many steps more: float32's own rounding of x / t + δ.
_BIAS = 2.0**-14
#: Steps are no smaller than for rows of this size, so that their inverse is finite.
_SMALLEST = 1e-30
#: Elements of rows whose products cannot overflow 32 bits.
_WIDEST = 1 << 17


class Products(ABC):
    """The inner products of the rows of x with the rows of y.

    Args:
        x, y: (n, d), (m, d) float32 or float64, finite.
        precision: Of the multiplication.

    Attributes:
        norms: Of the rows, (n,) and (m,), added up in float64.
        left, right: (n, q), (q, m): bounds are above the products by ``left @ right``, give or take as much.
        slack: How much further bounds can be off.
        error: About the mean error of a product of rows of norm 1.
    """

    norms: tuple[Tensor, Tensor]
    left: Tensor
    right: Tensor
    error: float

    def __init__(self, x: Points, y: Points, precision: torch.dtype):
        self._points, self.precision, self.slack = (x, y), precision, 0.0
        self._panels: dict[int, Any] = {}  # first row of a panel of y -> its rounded rows
        self._room = len(y) * y.shape[1] * precision.itemsize <= KEPT

    def blocks(self) -> Iterator[slice]:
        """Blocks of so many rows of x that it does not matter how long it takes to make and to round those of y."""
        return row_blocks(len(self._points[0]), 1, PANEL_ROWS * (1 if self._room else 2))

    def upper(self, block: slice, out: Tensor) -> None:
        """Upper bounds of the products of some rows of x with all of y, (r, m)."""
        x = self._rounded(0, block)
        for panel in row_blocks(len(self._points[1]), 1, PANEL_ROWS):
            y = self._panels.get(panel.start)
            if y is None:
                y = self._rounded(1, panel)
                if self._room:
                    self._panels[panel.start] = y
            self._multiply(x, y, out[:, panel])
        out.addmm_(self.left[block], self.right)

    @abstractmethod
    def _rounded(self, side: int, which: slice) -> Any:
        """Some rows of x (side 0) or y (1) in the arithmetic of the products."""

    @abstractmethod
    def _multiply(self, x: Any, y: Any, out: Tensor) -> None:
        """Write the products of rounded rows (r, d), (p, d) into (r, p)."""


class FloatProducts(Products):
    """Products of rows in a floating-point format: bfloat16, or the points' own."""

    def __init__(self, x: Points, y: Points, precision: torch.dtype):
        import torch

        super().__init__(x, y, precision)
        width = x.shape[1]
        self._parts = [slice(at, min(at + _TERMS, width)) for at in range(0, width, _TERMS)]
        self._half = torch.finfo(precision).eps / 2
        self._low = precision != x.dtype
        terms = min(width, _TERMS) + len(self._parts) + 8  # 8: the other steps to a squared distance
        self.error = terms * torch.finfo(x.dtype).eps / 2
        (size, r), (other, s) = (_sizes(points, _rounding(precision)) for points in (x, y))  # (n,) or (m,) each
        self.norms = size, other
        if self._low:
            r, s = ((1 + 2.0**-10) * float(rounding.max()) for rounding in (r, s))
            self.error += r + s + r * s
        self.left, self.right = self.error * size.unsqueeze(1), other.unsqueeze(0)  # (n, 1), (1, m)
        if self._low and min(float(size.max()), float(other.max())) < _SHORTEST:
            self.error = math.inf

    def _rounded(self, side: int, which: slice) -> Tensor:
        import torch

        points = self._points[side]
        if isinstance(points, torch.Tensor) and points.dtype == self.precision:
            return points[which]
        count, width = which.stop - which.start, points.shape[1]
        rounded = torch.empty(count, width, dtype=self.precision, device=points.device)
        for part in row_blocks(count, width):
            rounded[part] = points[which.start + part.start : which.start + part.stop]
        return rounded

    def _multiply(self, x: Tensor, y: Tensor, out: Tensor) -> None:
        largest = 0.0  # that the absolute values of the parts add up to
        out.zero_()
        for part in self._parts:
            if self._low:
                found = x[:, part] @ y[:, part].t()  # (r, p)
                for rows in row_blocks(*found.shape):
                    out[rows] += found[rows]
                    out[rows].add_(found[rows].abs_(), alpha=self._half * (1 + 2 * self._half))
                largest += float(found.max())
            else:
                out.addmm_(x[:, part], y[:, part].t())
        self.slack = max(self.slack, 2 * self._half * largest)


class _Steps(NamedTuple):
    """Rows in steps of their own.

    Attributes:
        rows: (r, d) int8.
        size: The step of each, (r, 1).
        dither: The products of ``rows`` with the other side's dither, (r, 1).
    """

    rows: Tensor
    size: Tensor
    dither: Tensor


class IntegerProducts(Products):
    """Products of rows in steps of their own, 8-bit integers with subtractive dither."""

    def __init__(self, x: Points, y: Points, precision: torch.dtype):
        import torch

        super().__init__(x, y, precision)
        width, g = x.shape[1], torch.Generator().manual_seed(_SEED)
        self._dither = [torch.rand(width, generator=g) for _ in (x, y)]  # (d,) each
        self._both = torch.dot(*(dither.double() - 0.5 for dither in self._dither)).item()
        (size, most), (other_size, other_most) = (_sizes(points, _largest) for points in (x, y))  # (n,) or (m,) each
        self.norms = size, other_size
        steps = self._steps = [largest.clamp_min(_SMALLEST) / _STEPS for largest in (most, other_most)]
        lengths = [norms + math.sqrt(width) * step for norms, step in zip(self.norms, steps, strict=True)]  # of x̂, ŷ
        # tau sqrt(own² + other²), with own = step / length, is at most tau (own² + other²) / 2 c + tau c / 2 for any c.
        own, other = (step / length for step, length in zip(steps, lengths, strict=True))  # (n,), (m,)
        means = [float(step.sum() / length.sum()) for step, length in zip(steps, lengths, strict=True)]
        tau = math.sqrt(math.log(2 * len(x) * len(y) / _FAILURE) / 6) + math.sqrt(2 * width) * _BIAS
        near = (own.square() + means[1] ** 2).sqrt_()  # (n,): c
        rounding = 16 * torch.finfo(x.dtype).eps  # of the steps from integers to a squared distance
        share = tau / 2 * (own.square() / near + near) + rounding
        self.left = torch.stack((lengths[0] * share, lengths[0] * tau / 2 / near), 1)  # (n, 2)
        self.right = torch.stack((lengths[1], lengths[1] * other.square()))  # (2, m)
        self.error = tau * math.hypot(*means)

    def _rounded(self, side: int, which: slice) -> _Steps:
        import torch

        points = self._points[side]
        own, other = self._dither[side], self._dither[1 - side].double() - 0.5  # (d,) each
        size = self._steps[side][which].unsqueeze(1)  # (r, 1)
        rows = torch.empty(len(size), points.shape[1], dtype=torch.int8)  # (r, d)
        dither = torch.empty_like(size)  # (r, 1)
        for part in row_blocks(*rows.shape):
            some = points[which.start + part.start : which.start + part.stop]  # (p, d)
            steps = (some * (1 / size[part])).add_(own).floor_()
            rows[part] = steps
            dither[part, 0] = torch.mv(steps.double(), other).to(dither.dtype)
        return _Steps(rows, size, dither)

    def _multiply(self, x: _Steps, y: _Steps, out: Tensor) -> None:
        import torch

        whole = torch.ops.aten._int_mm(x.rows, y.rows.t())  # (r, p) int32
        offset = y.dither.t() - self._both  # (1, p)
        for part in row_blocks(*whole.shape):
            rows = out[part].copy_(whole[part])
            rows.sub_(x.dither[part]).sub_(offset).mul_(y.size.t()).mul_(x.size[part])


def products(x: Points, y: Points, precision: torch.dtype) -> Products:
    """The products of a precision: a floating-point dtype, or ``torch.int8``."""
    kind = FloatProducts if precision.is_floating_point else IntegerProducts
    return kind(x, y, precision)


def fast_precisions(x: Points) -> list[torch.dtype]:
    """The precisions in which products of rows take less time on their device than in their own, fastest first."""
    import torch

    if x.device.type != "cpu" or x.dtype != torch.float32:
        return []
    features = getattr(torch.cpu, "get_capabilities", dict)()
    fast = []
    if (features.get("amx_int8") or features.get("avx512_vnni")) and exact_integers(x.shape[1]):
        fast.append(torch.int8)
    if features.get("amx_bf16") or features.get("avx512_bf16"):
        fast.append(torch.bfloat16)
    return fast


def exact_integers(width: int) -> bool:
    """Whether products of rows of 8-bit integers are fast and exact here. (The library's instructions for older
    processors, which ``ONEDNN_MAX_CPU_ISA`` can choose, saturate at 16 bits; rows of one element come out wrong.)"""
    import torch

    library = torch.backends.mkldnn
    available = hasattr(torch.ops.aten, "_int_mm") and library.is_available() and library.enabled
    if not available or width > _WIDEST:
        return False
    x = torch.full((32, width), 127, dtype=torch.int8)
    y = x.clone()
    y[:, ::3] = -127
    found = (torch.ops.aten._int_mm(rows, rows.t()) for rows in (x, y))
    return all(bool((product == width * 127**2).all()) for product in found)


def _sizes(points: Points, measure: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """The norm of each row, and what else is measured of rows, (r, d) -> (r,), in one pass; (n,) each."""
    import torch

    norms, measured = torch.empty(2, len(points), dtype=points.dtype, device=points.device)
    for part, rows in parts(points):
        norms[part], measured[part] = row_norms(rows, torch.float64), measure(rows)
    return norms, measured


def _largest(rows: Tensor) -> Tensor:
    """The largest absolute value of each row, (r, d) -> (r,)."""
    import torch

    return torch.maximum(rows.amax(1), -rows.amin(1))


def _rounding(precision: torch.dtype) -> Callable[[Tensor], Tensor]:
    """The distances of rows to their rounded selves over their norms, (r, d) -> (r,)."""

    def measure(rows: Tensor) -> Tensor:
        if rows.dtype == precision:
            return rows.new_zeros(len(rows))
        norms = row_norms(rows)  # (r,)
        return row_norms(rows - rows.to(precision)) / norms.where(norms > 0, 1)

    return measure
