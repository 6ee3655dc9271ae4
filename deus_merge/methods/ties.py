"""Trim, elect sign, merge."""

from __future__ import annotations

from ._sparsify import largest
from ._task_vectors import TaskVectorMethod, family_parameters


class Ties(TaskVectorMethod):
    name = "ties"
    summary = "task vectors, their small elements dropped, merged where their signs agree"
    reference = "Yadav et al., TIES-Merging, arXiv 2306.01708"
    consensus = True
    parameters = family_parameters(normalize=True, rescale=False)

    def sparsify(self, inputs, source):
        return largest(inputs, source, inputs.output.source_parameters[source]["density"])


METHOD = Ties()
