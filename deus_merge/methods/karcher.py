"""The mean on the sphere: the point whose squared arc lengths to the sources add up to the least."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ..core.parameters import Parameter
from ._runs import TensorwiseMethod
from ._spans import combined, gram
from .base import COMPUTE, copy_of

if TYPE_CHECKING:
    import torch

_OPPOSITE = 1e-7  # sin θ below which two directions are opposite, and no arc between them is the shortest


class Karcher(TensorwiseMethod):
    name = "karcher"
    summary = "Karcher mean: the middle of the sources on the sphere, with the mean of their norms"
    reference = "Karcher, Riemannian center of mass and mollifier smoothing, Comm. Pure Appl. Math. 30, 1977"
    adds_base = True
    parameters = (
        Parameter("max_iter", "integer", 10, "most steps towards the mean", minimum=0),
        Parameter("tol", "number", 1e-5, "a step, an angle or a norm shorter than this counts as none", minimum=0),
    )

    def decide(self, output):
        return copy_of(0) if len(output.source_parameters) == 1 else COMPUTE

    def compute(self, inputs):
        sources = list(range(len(inputs.stored)))
        p = inputs.output.parameters
        return combined(inputs, sources, mean_coefficients(gram(inputs, sources), p["max_iter"], p["tol"]).tolist())


def mean_coefficients(products: torch.Tensor, max_iter: int, tol: float) -> torch.Tensor:
    """The Karcher mean of vectors, by gradient steps along the sphere, in coordinates of the vectors.

    Every step stays in the span of the vectors, so their dot products are all that is needed.

    Args:
        products: Gram matrix of the vectors, (s, s), float64.
        max_iter: Most steps.
        tol: See the parameters.

    Returns:
        Coefficients of the vectors, (s,), float64: of the mean direction times the mean norm. Zeros where every
        vector is shorter than ``tol``.
    """
    import torch

    norms = products.diagonal().clamp(min=0).sqrt()  # (s,)
    long = norms > tol  # (s,)
    if not long.any():
        return torch.zeros_like(norms)
    inverse = torch.where(long, 1 / norms, 0)  # (s,)
    cosines = inverse[:, None] * products * inverse  # (s, s)
    share = long.double() / long.sum()  # (s,)

    def length(vector: torch.Tensor) -> float:
        return float((vector @ cosines @ vector).clamp(min=0).sqrt())

    first = torch.zeros_like(share).index_fill_(0, long.int().argmax(), 1)  # (s,), for when the directions cancel out
    mean = share / length(share) if length(share) >= tol else first  # (s,)
    for _ in range(max_iter):
        dots = (cosines @ mean).clamp(-1, 1)  # (s,)
        angles = dots.arccos()  # (s,)
        moves = long & (angles >= tol) & (angles.sin() >= _OPPOSITE)
        pulls = torch.where(moves, share * angles / angles.sin(), 0)  # (s,)
        step = pulls - (pulls @ dots) * mean  # (s,), the sum of share * log map
        size = length(step)
        if size < tol:
            break
        mean = math.cos(size) * mean + math.sin(size) / size * step
        mean = mean / length(mean) if length(mean) > tol else mean
    return mean * inverse * norms.mean()


METHOD = Karcher()
