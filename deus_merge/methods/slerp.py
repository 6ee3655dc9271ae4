"""Spherical interpolation between two tensors."""

from __future__ import annotations

import math

from ..core.parameters import REQUIRED, Parameter
from ._runs import TensorwiseMethod
from ._spans import combined, gram
from .base import COMPUTE, Refusal, copy_of

_COLINEAR = 0.9995  # above this cosine the arc is a chord
_EPSILON = 1e-8  # a norm at most this counts as 1: the directions of (nearly) nothing are at right angles to all


class Slerp(TensorwiseMethod):
    name = "slerp"
    summary = "spherical interpolation from the base model (t = 0) to the other source (t = 1)"
    reference = "Shoemake, Animating rotation with quaternion curves, SIGGRAPH 1985"
    adds_base = True
    base = "optional"
    copies_one = True
    parameters = (Parameter("t", "number", REQUIRED, "0 gives the base model, 1 the other source"),)

    def check(self, outputs, sources):
        return None if sources in (1, 2) else Refusal(f"slerp takes exactly two models, not {sources}")

    def warning(self, output):
        alone = len(output.inputs) == 1
        return "a slice of slerp has one source: it is copied, and t has no effect there" if alone else None

    def decide(self, output):
        return copy_of(0) if len(output.inputs) == 1 else COMPUTE

    def compute(self, inputs):
        start = inputs.base or 0
        sources = [start, 1 - start]
        (aa, ab), (_, bb) = gram(inputs, sources).tolist()
        norms = [n if n > _EPSILON else 1.0 for n in (math.sqrt(aa), math.sqrt(bb))]
        cosine = ab / (norms[0] * norms[1])
        return combined(inputs, sources, arc(inputs.output.parameters["t"], cosine))


def arc(t: float, cosine: float) -> tuple[float, float]:
    """The coefficients of two vectors at ``t`` on the arc that their directions span.

    Args:
        t: 0 to 1 (beyond extrapolates).
        cosine: Cosine of the angle θ between them.

    Returns:
        ``sin((1-t)θ) / sin θ`` and ``sin(tθ) / sin θ``; ``1 - t`` and ``t`` where the directions (nearly) coincide.
    """
    if abs(cosine) > _COLINEAR:
        return 1 - t, t
    theta = math.acos(cosine)
    return math.sin((1 - t) * theta) / math.sin(theta), math.sin(t * theta) / math.sin(theta)


METHOD = Slerp()
