"""Weighted mean of tensors (model soups)."""

from __future__ import annotations

from functools import partial

from ..core.parameters import REQUIRED, Parameter
from ._runs import PieceMethod, weighted_sum
from .base import Compute, CopyOf


class Linear(PieceMethod):
    name = "linear"
    summary = "weighted mean (or sum) of the sources"
    reference = "Wortsman et al., Model soups, arXiv 2203.05482"
    adds_base = True
    parameters = (
        Parameter("weight", "number", REQUIRED, "weight of a source", scope="source"),
        Parameter("normalize", "boolean", True, "divide by the sum of the weights"),
    )

    def remark(self, task):
        if task.parameters["normalize"] and abs(sum(p["weight"] for p in task.source_parameters)) < 1e-8:
            return "linear: the weights sum to 0, so they are not normalised"
        return None

    def origin(self, task):
        """A source that alone has weight is copied."""
        weights = self._weights(task)
        used = [i for i, w in enumerate(weights) if w != 0]
        return CopyOf(used[0]) if len(used) == 1 and weights[used[0]] == 1 else Compute()

    def make(self, pieces):
        return pieces.made(partial(weighted_sum, pieces, self._weights(pieces.task)))

    def _weights(self, task) -> list[float]:
        weights = [p["weight"] for p in task.source_parameters]
        total = sum(weights)
        if task.parameters["normalize"] and abs(total) >= 1e-8:
            return [w / total for w in weights]
        return weights


METHOD = Linear()
