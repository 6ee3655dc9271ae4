"""Drop and rescale, then add."""

from __future__ import annotations

import math

from ._sparsify import by_chance
from ._task_vectors import TaskVectorMethod, family_parameters
from .base import CONCURRENT_OUTPUTS


class DareLinear(TaskVectorMethod):
    name = "dare_linear"
    summary = "task vectors with random elements dropped and the rest scaled up, added"
    reference = "Yu et al., Language models are super Mario (DARE), arXiv 2311.03099"
    parameters = family_parameters(normalize=False, rescale=True)

    def workspace(self, outputs):
        """Also a bit for each element of a source: how its coin fell."""
        bits = max((math.prod(t.shape) * len(t.source_parameters) for t in outputs), default=0)
        return super().workspace(outputs) + CONCURRENT_OUTPUTS * bits // 8

    def sparsify(self, inputs, source):
        return by_chance(inputs, source, inputs.output.source_parameters[source]["density"])


METHOD = DareLinear()
