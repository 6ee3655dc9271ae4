"""Drop and rescale, then add."""

from __future__ import annotations

from ._sparsify import by_chance
from ._task_vectors import TaskVectorMethod, family_parameters


class DareLinear(TaskVectorMethod):
    name = "dare_linear"
    summary = "task vectors with random elements dropped and the rest scaled up, added"
    reference = "Yu et al., Language models are super Mario (DARE), arXiv 2311.03099"
    parameters = family_parameters(normalize=False, rescale=True)

    def sparsify(self, pieces, source):
        return by_chance(pieces, source, pieces.task.source_parameters[source]["density"])


METHOD = DareLinear()
