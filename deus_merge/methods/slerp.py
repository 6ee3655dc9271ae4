"""Spherical interpolation between two tensors."""

from __future__ import annotations

from ..method import Compute, MergeMethod, Parameter, per_tensor

_COLINEAR = 0.9995  # above this cosine the arc is a chord
_EPSILON = 1e-8
_PIECE = 1 << 20  # elements that are widened to float64 at a time


class Slerp(MergeMethod):
    name = "slerp"
    summary = "spherical interpolation from the base model (t = 0) to the other source (t = 1)"
    reference = "Shoemake, Animating rotation with quaternion curves, SIGGRAPH 1985"
    adds_base = True
    base = "optional"
    parameters = (Parameter("t", "number", 0.5, "0 gives the base model, 1 the other source"),)

    def check(self, tasks, sources):
        return None if sources == 2 else f"slerp takes exactly two models, not {sources}"

    def origin(self, task):
        return Compute()

    def merge(self, block):
        start = block.base or 0

        def interpolate(tensors, task):
            return slerp(task.parameters["t"], tensors[start], tensors[1 - start])

        return per_tensor(block, self.origin, interpolate)


def slerp(t: float, start, end):
    """The point at ``t`` on the arc between two tensors, taken as vectors whose directions span the arc.

    Args:
        t: 0 to 1 (beyond extrapolates).
        start, end: Tensors of one shape and float dtype; lengths need not agree, they are interpolated along.

    Returns:
        ``sin((1-t)θ)/sin θ · start + sin(tθ)/sin θ · end``; the straight line where the directions (nearly) coincide.
    """
    import torch

    norms = torch.linalg.vector_norm(start, dtype=torch.float64), torch.linalg.vector_norm(end, dtype=torch.float64)
    if min(norms) <= _EPSILON:
        return torch.lerp(start, end, t)
    pieces = zip(start.flatten().split(_PIECE), end.flatten().split(_PIECE), strict=True)
    dot = sum(torch.dot(a.double(), b.double()) for a, b in pieces) / (norms[0] * norms[1])
    if dot.abs() > _COLINEAR:
        return torch.lerp(start, end, t)
    theta = torch.arccos(dot)
    weights = torch.sin((1 - t) * theta) / torch.sin(theta), torch.sin(t * theta) / torch.sin(theta)
    return start * weights[0].item() + end * weights[1].item()


METHOD = Slerp()
