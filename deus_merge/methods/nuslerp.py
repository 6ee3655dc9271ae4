"""Spherical interpolation by weights: of tensors, rows or columns; of two models or of what they add to a base."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ..core.parameters import REQUIRED, Parameter
from ._runs import PieceMethod, Pieces, row_length
from ._spans import combined, gram

if TYPE_CHECKING:
    import torch

_SHORT = 1e-7  # a norm below this counts as this much
_BALANCED = 1e-6  # weights whose sum is at most this large mean the middle


class NuSlerp(PieceMethod):
    name = "nuslerp"
    summary = "spherical interpolation of two sources by their weights, or of what they add to the base model"
    reference = "Goddard et al., mergekit; Shoemake, Animating rotation with quaternion curves, SIGGRAPH 1985"
    adds_base = True
    base = "optional"
    others = (2, 2)
    parameters = (
        Parameter("weight", "number", REQUIRED, "weight of a source", scope="source"),
        Parameter("nuslerp_flatten", "boolean", True, "one arc per tensor; else one per row"),
        Parameter("nuslerp_row_wise", "boolean", False, "without nuslerp_flatten: one arc per column, across the rows"),
    )

    def step(self, task):
        return row_length(task.shape) if len(task.shape) > 1 else 1

    def make(self, pieces):
        weights = [pieces.task.source_parameters[i]["weight"] for i in pieces.others]
        t = 0.5 if abs(sum(weights)) < _BALANCED else weights[1] / sum(weights)
        p, shape = pieces.task.parameters, pieces.task.shape
        if p["nuslerp_flatten"] or len(shape) < 2:
            relative = pieces.base is not None
            products = gram(pieces, pieces.others, relative=relative)  # (2, 2)
            start, end = arcs(t, products[0, 0], products[1, 1], products[0, 1])
            return combined(pieces, pieces.others, [float(start), float(end)], relative=relative)
        if p["nuslerp_row_wise"]:
            return _by_column(pieces, t, math.prod(shape[1:]))
        return pieces.made(lambda run: _mix(pieces, run, shape[-1], lambda a, b: arcs(t, *_products(a, b, 1)), 1))


def arcs(t: float, aa: torch.Tensor, bb: torch.Tensor, ab: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Coefficients of pairs of vectors at ``t`` on the arcs that their directions span.

    Args:
        t: 0 to 1.
        aa, bb, ab: ⟨a, a⟩, ⟨b, b⟩ and ⟨a, b⟩ of each pair, float64, (...).

    Returns:
        ``sin((1-t)θ) / sin θ`` and ``sin(tθ) / sin θ``, (...); ``1 - t`` and ``t`` where float32 sees no angle.
    """
    import torch

    cosine = ab / (aa.sqrt().clamp(min=_SHORT) * bb.sqrt().clamp(min=_SHORT))
    colinear = cosine.abs().float() >= 1
    theta = torch.where(colinear, 0, cosine).arccos()
    start, end = torch.sin((1 - t) * theta) / torch.sin(theta), torch.sin(t * theta) / torch.sin(theta)
    return torch.where(colinear, 1 - t, start), torch.where(colinear, t, end)


def _products(a: torch.Tensor, b: torch.Tensor, dim: int) -> tuple[torch.Tensor, ...]:
    """⟨a, a⟩, ⟨b, b⟩ and ⟨a, b⟩ along an axis, float64."""
    a, b = a.double(), b.double()
    return (a * a).sum(dim), (b * b).sum(dim), (a * b).sum(dim)


def _mix(pieces: Pieces, run: slice, width: int, coefficients, dim: int) -> torch.Tensor:
    """A run as rows, each with coefficients of its own (``dim`` 1) or all with one for each column (``dim`` 0)."""
    a, b = (pieces.delta(i, run).view(-1, width) for i in pieces.others)  # (rows, width) each
    start, end = (c.to(a.dtype).unsqueeze(dim) for c in coefficients(a, b))  # (rows, 1) or (1, width)
    result = a.mul_(start).add_(b.mul_(end)).view(-1)  # (m,)
    return result if pieces.base is None else result.add_(pieces.addend(pieces.base, run))


def _by_column(pieces: Pieces, t: float, width: int):
    sums = [0.0, 0.0, 0.0]
    for run in pieces.runs():
        a, b = (pieces.delta(i, run).view(-1, width) for i in pieces.others)  # (rows, width) each
        sums = [s + p for s, p in zip(sums, _products(a, b, 0), strict=True)]  # (width,) each
    found = arcs(t, *sums)
    return pieces.made(lambda run: _mix(pieces, run, width, lambda a, b: found, 0))


METHOD = NuSlerp()
