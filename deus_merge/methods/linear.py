"""Weighted mean of tensors (model soups)."""

from __future__ import annotations

from functools import partial

from ..core.parameters import REQUIRED, Parameter
from ._runs import TensorwiseMethod, weighted_sum
from .base import COMPUTE, copy_of


class Linear(TensorwiseMethod):
    name = "linear"
    summary = "weighted mean (or sum) of the sources"
    reference = "Wortsman et al., Model soups, arXiv 2203.05482"
    adds_base = True
    parameters = (
        Parameter("weight", "number", REQUIRED, "weight of a source", scope="source"),
        Parameter("normalize", "boolean", True, "divide by the sum of the weights"),
    )

    def warning(self, output):
        if output.parameters["normalize"] and abs(sum(p["weight"] for p in output.source_parameters)) < 1e-8:
            return "linear: the weights sum to 0, so they are not normalised"
        return None

    def decide(self, output):
        """A source that alone has weight is copied."""
        weights = self._weights(output)
        used = [i for i, w in enumerate(weights) if w != 0]
        return copy_of(used[0]) if len(used) == 1 and weights[used[0]] == 1 else COMPUTE

    def compute(self, inputs):
        return inputs.each_run(partial(weighted_sum, inputs, self._weights(inputs.output)))

    def _weights(self, output) -> list[float]:
        weights = [p["weight"] for p in output.source_parameters]
        total = sum(weights)
        if output.parameters["normalize"] and abs(total) >= 1e-8:
            return [w / total for w in weights]
        return weights


METHOD = Linear()
