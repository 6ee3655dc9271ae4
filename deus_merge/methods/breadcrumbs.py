"""Drop the smallest and the largest, then add."""

from __future__ import annotations

from ..core.parameters import Parameter
from ._sparsify import middling
from ._task_vectors import TaskVectorMethod, family_parameters

_GAMMA = "share of a task vector, its very largest elements, that is dropped"


class Breadcrumbs(TaskVectorMethod):
    name = "breadcrumbs"
    summary = "task vectors, their small elements and their outliers dropped, added"
    reference = "Davari, Belilovsky, Model Breadcrumbs, arXiv 2312.06795"
    parameters = family_parameters(
        Parameter("gamma", "number", 0.01, _GAMMA, "source", minimum=0, maximum=1), normalize=False, rescale=False
    )

    def sparsify(self, inputs, source):
        parameters = inputs.output.source_parameters[source]
        return middling(inputs, source, parameters["density"], parameters["gamma"])


METHOD = Breadcrumbs()
