"""Costs between the rows of two matrices, exact to a few units of rounding also where rows nearly agree.

Squared distances come from one matrix product, ``|x|² + |y|² - 2 x·y``, which loses all digits where x ≈ y: there, and
only there, they are computed again from ``x - y``. A planted permutation therefore has cost 0 on its matches.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import SolverError, nearest
from .problem import row_blocks

if TYPE_CHECKING:
    from torch import Tensor

#: Squared distances below this share of ``|x|² + |y|²`` are computed again, by dtype.
_CLOSE = {"torch.float32": 2.0**-7, "torch.float64": 2.0**-20}
#: Close pairs recomputed at once: bounds the (pairs, d) buffer.
_PAIRS = 2048


def sqeuclidean(x: Tensor, y: Tensor) -> Tensor:
    """‖x_r - y_s‖²: (n, d), (m, d) -> (n, m), in the dtype of the inputs (float32 or float64)."""
    import torch

    _check(x, y)
    mean = (x.mean(0) + y.mean(0)) / 2  # (d,): a common offset of all rows costs digits
    u, v = x - mean, y - mean
    x2, y2 = u.norm(dim=1).square_(), v.norm(dim=1).square_()  # (n,), (m,)
    cost = u @ v.t()  # (n, m)
    del u, v
    close, largest = _CLOSE[str(x.dtype)], y2.max()
    for block in row_blocks(*cost.shape):
        rows = cost[block]  # (r, m)
        scale = x2[block].unsqueeze(1) + y2  # (r, m)
        torch.sub(scale, rows, alpha=2, out=rows).clamp_min_(0)
        if bool((rows.amin(1) < close * (x2[block] + largest)).any()):
            _recompute_close(rows, x[block], y, mean, scale)
    return cost


def _recompute_close(rows: Tensor, x: Tensor, y: Tensor, mean: Tensor, scale: Tensor) -> None:
    """Squared distances far below ``|x|² + |y|²`` again; ``rows`` and ``scale`` (r, m)."""
    few = 4 * max(rows.shape)
    pairs = (rows < _CLOSE[str(x.dtype)] * scale).nonzero()  # (p, 2)
    if len(pairs) > few:  # many rows alike: one product in float64 is cheaper, and leaves few or exact copies
        rows.copy_(_sqeuclidean_float64(x.double() - mean, y.double() - mean))
        pairs = (rows < 2.0**-36 * scale).nonzero()
        if len(pairs) > few:
            return
    for part in pairs.split(_PAIRS):
        r, s = part.unbind(1)
        rows[r, s] = (x[r] - y[s]).square_().sum(1)


def euclidean(x: Tensor, y: Tensor) -> Tensor:
    """‖x_r - y_s‖₂: (n, d), (m, d) -> (n, m)."""
    return sqeuclidean(x, y).sqrt_()


def cosine(x: Tensor, y: Tensor) -> Tensor:
    """1 - cos(x_r, y_s): (n, d), (m, d) -> (n, m); half the squared distance of the unit rows, exact near 0."""
    return sqeuclidean(unit_rows(x), unit_rows(y)).mul_(0.5)


#: The costs a recipe can name.
COSTS = {"euclidean": euclidean, "sqeuclidean": sqeuclidean, "cosine": cosine}
#: The scalings a recipe can name.
COST_SCALES = ("none", "max", "median")


def cost_matrix(
    x: Tensor, y: Tensor, *, cost: str = "euclidean", unit: bool = False, cost_scale: str = "none"
) -> Tensor:
    """The cost a recipe asks for: (n, d), (m, d) -> (n, m).

    Args:
        cost: A key of `COSTS`.
        unit: Scale rows to norm 1 first.
        cost_scale: Divide by the matrix's maximum or median; one of `COST_SCALES`.

    Raises:
        SolverError: an unknown name, or rows of different length.
    """
    if cost not in COSTS:
        raise SolverError("unknown cost", expected=" | ".join(COSTS), got=cost, hint=nearest(cost, COSTS))
    if cost_scale not in COST_SCALES:
        raise SolverError(
            "unknown cost_scale",
            expected=" | ".join(COST_SCALES),
            got=cost_scale,
            hint=nearest(cost_scale, COST_SCALES),
        )
    matrix = COSTS[cost](unit_rows(x), unit_rows(y)) if unit else COSTS[cost](x, y)  # (n, m)
    if cost_scale == "none":
        return matrix
    size = (matrix.max() if cost_scale == "max" else matrix.median()).item()
    return matrix.div_(size) if size > 0 else matrix


def unit_rows(x: Tensor) -> Tensor:
    """Rows scaled to norm 1; zero rows stay zero. (n, d) -> (n, d)"""
    norm = x.norm(dim=1, keepdim=True)  # (n, 1)
    return x / norm.where(norm > 0, 1)


def _sqeuclidean_float64(x: Tensor, y: Tensor) -> Tensor:
    cost = (x @ y.t()).mul_(-2)  # (n, m)
    return cost.add_(x.square().sum(1, keepdim=True)).add_(y.square().sum(1)).clamp_min_(0)


def _check(x: Tensor, y: Tensor) -> None:
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1]:
        raise SolverError("rows of different length", got=f"{tuple(x.shape)} and {tuple(y.shape)}")
    if x.dtype != y.dtype or str(x.dtype) not in _CLOSE:
        raise SolverError("costs are computed in float32 or float64", got=f"{x.dtype} and {y.dtype}")
