"""Spherical interpolation by weights: of tensors, rows or columns; of two models or of what they add to a base."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ..core.parameters import REQUIRED, Parameter
from ._runs import FlatInputs, TensorwiseMethod, row_length
from ._spans import combined, gram

if TYPE_CHECKING:
    import torch

_SHORT = 1e-7  # a norm below this counts as this much
_BALANCED = 1e-6  # weights whose sum is at most this large mean the middle


class NuSlerp(TensorwiseMethod):
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

    def step(self, output):
        return row_length(output.shape) if len(output.shape) > 1 else 1

    def compute(self, inputs):
        weights = [inputs.output.source_parameters[i]["weight"] for i in inputs.others]
        t = 0.5 if abs(sum(weights)) < _BALANCED else weights[1] / sum(weights)
        p, shape = inputs.output.parameters, inputs.output.shape
        if p["nuslerp_flatten"] or len(shape) < 2:
            relative = inputs.base is not None
            products = gram(inputs, inputs.others, relative=relative)  # (2, 2)
            start, end = arcs(t, products[0, 0], products[1, 1], products[0, 1])
            return combined(inputs, inputs.others, [float(start), float(end)], relative=relative)
        if p["nuslerp_row_wise"]:
            return _by_column(inputs, t, math.prod(shape[1:]))
        return inputs.each_run(lambda run: _mix(inputs, run, shape[-1], lambda a, b: arcs(t, *_products(a, b, 1)), 1))


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


def _mix(inputs: FlatInputs, run: slice, width: int, coefficients, dim: int) -> torch.Tensor:
    """A run as rows, each with coefficients of its own (``dim`` 1) or all with one for each column (``dim`` 0)."""
    a, b = (inputs.delta(i, run).view(-1, width) for i in inputs.others)  # (rows, width) each
    start, end = (c.to(a.dtype).unsqueeze(dim) for c in coefficients(a, b))  # (rows, 1) or (1, width)
    result = a.mul_(start).add_(b.mul_(end)).view(-1)  # (m,)
    return result if inputs.base is None else result.add_(inputs.addend(inputs.base, run))


def _by_column(inputs: FlatInputs, t: float, width: int):
    import torch

    sums = [torch.zeros(width, dtype=torch.float64, device=inputs.stored[0].device) for _ in range(3)]  # (width,) each
    for run in inputs.runs():
        a, b = (inputs.delta(i, run).view(-1, width) for i in inputs.others)  # (rows, width) each
        sums = [s + p for s, p in zip(sums, _products(a, b, 0), strict=True)]  # (width,) each
    found = arcs(t, *sums)
    return inputs.each_run(lambda run: _mix(inputs, run, width, lambda a, b: found, 0))


METHOD = NuSlerp()
