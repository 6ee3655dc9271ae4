"""Spherical interpolation of any number of tensors."""

from __future__ import annotations

import math

from ..core.errors import PlanError
from ..core.parameters import REQUIRED, Parameter
from ._runs import PieceMethod, others
from ._spans import combined, gram
from .base import Compute, CopyOf


class MultiSlerp(PieceMethod):
    name = "multislerp"
    summary = "weighted mean direction of the sources (or of what they add to the base model) with their mean norm"
    reference = "Goddard, Multi-SLERP, goddard.blog/posts/multislerp-wow-what-a-cool-idea"
    adds_base = True
    base = "optional"
    parameters = (
        Parameter("weight", "number", REQUIRED, "weight of a source", scope="source"),
        Parameter("normalize_weights", "boolean", True, "divide the weights by their sum"),
        Parameter("eps", "number", 1e-8, "a norm below this counts as none", minimum=0),
    )

    def check(self, tasks, sources):
        for task in tasks:
            weights = [task.source_parameters[i]["weight"] for i in others(task)]
            given = REQUIRED not in weights and len(weights) > 1
            if task.parameters["normalize_weights"] and given and sum(weights) == 0:
                return f"weight: the weights sum to 0 for {task.name}, so they cannot be normalised"
        return None

    def origin(self, task):
        """A source alone is copied."""
        return CopyOf(others(task)[0]) if len(others(task)) == 1 else Compute()

    def make(self, pieces):
        """The mean of the unit vectors, brought to length 1 and then to the mean norm.

        The published method then goes to the tangent space at that mean and back. The weighted sum of the tangent
        vectors there is zero, so the step leads nowhere and none is made.
        """
        p, sources = pieces.task.parameters, pieces.others
        relative = pieces.base is not None
        weights = [pieces.task.source_parameters[i]["weight"] for i in sources]
        if p["normalize_weights"]:
            weights = [w / sum(weights) for w in weights]
        products = gram(pieces, sources, relative=relative).tolist()  # (s, s)
        norms = [math.sqrt(products[i][i]) for i in range(len(sources))]
        shares = [w / (n + p["eps"]) for w, n in zip(weights, norms, strict=True)]  # of the vectors in the mean
        squared = sum(a * b * products[i][j] for i, a in enumerate(shares) for j, b in enumerate(shares))
        length = math.sqrt(max(squared, 0))
        if length < p["eps"]:
            if len(sources) > 2 and max(norms) > p["eps"]:
                raise PlanError(
                    f"multislerp: the weighted directions cancel out in {pieces.task.name}",
                    expected="a mean direction",
                    hint="choose other weights",
                )
            return combined(pieces, sources, weights, relative=relative)
        scale = sum(w * n for w, n in zip(weights, norms, strict=True)) / length
        return combined(pieces, sources, [scale * share for share in shares], relative=relative)


METHOD = MultiSlerp()
