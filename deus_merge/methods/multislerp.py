"""Spherical interpolation of any number of tensors."""

from __future__ import annotations

import math

from ..core.errors import PlanError
from ..core.parameters import REQUIRED, Parameter
from ._runs import TensorwiseMethod, others
from ._spans import combined, gram
from .base import COMPUTE, Refusal, copy_of


class MultiSlerp(TensorwiseMethod):
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

    def check(self, outputs, sources):
        for output in outputs:
            weights = [output.source_parameters[i]["weight"] for i in others(output)]
            given = REQUIRED not in weights and len(weights) > 1
            if output.parameters["normalize_weights"] and given and sum(weights) == 0:
                message = f"the weights sum to 0 for {output.name}, so they cannot be normalised"
                return Refusal(message, "weight")
        return None

    def decide(self, output):
        """A source alone is copied."""
        return copy_of(others(output)[0]) if len(others(output)) == 1 else COMPUTE

    def compute(self, inputs):
        """The mean of the unit vectors, brought to length 1 and then to the mean norm.

        The published method then goes to the tangent space at that mean and back. The weighted sum of the tangent
        vectors there is zero, so the step leads nowhere and none is made.
        """
        p, sources = inputs.output.parameters, inputs.others
        relative = inputs.base is not None
        weights = [inputs.output.source_parameters[i]["weight"] for i in sources]
        if p["normalize_weights"]:
            weights = [w / sum(weights) for w in weights]
        products = gram(inputs, sources, relative=relative).tolist()  # (s, s)
        norms = [math.sqrt(products[i][i]) for i in range(len(sources))]
        shares = [w / (n + p["eps"]) for w, n in zip(weights, norms, strict=True)]  # of the vectors in the mean
        squared = sum(a * b * products[i][j] for i, a in enumerate(shares) for j, b in enumerate(shares))
        length = math.sqrt(max(squared, 0))
        if length < p["eps"]:
            if len(sources) > 2 and max(norms) > p["eps"]:
                raise PlanError(
                    f"multislerp: the weighted directions cancel out in {inputs.output.name}",
                    expected="a mean direction",
                    hint="choose other weights",
                )
            return combined(inputs, sources, weights, relative=relative)
        scale = sum(w * n for w, n in zip(weights, norms, strict=True)) / length
        return combined(inputs, sources, [scale * share for share in shares], relative=relative)


METHOD = MultiSlerp()
