"""Drop by magnitude and chance, then add."""

from __future__ import annotations

from ..core.parameters import Parameter
from ._runs import others, row_length
from ._sparsify import by_ranked_chance
from ._task_vectors import TaskVectorMethod, family_parameters
from .base import Refusal

_HELP = "how far a row's smallest and largest elements are from density in the probability of being kept"
EPSILON = Parameter("epsilon", "number", 0.15, _HELP, "source", minimum=0, maximum=0.5)


class DellaLinear(TaskVectorMethod):
    name = "della_linear"
    summary = "task vectors with random elements dropped, small ones more likely, added"
    reference = "Deep et al., DELLA-Merging, arXiv 2406.11617"
    parameters = family_parameters(EPSILON, normalize=False, rescale=True)

    def check(self, outputs, sources):
        for output in outputs:
            for i in others(output):
                density, epsilon = (output.source_parameters[i][name] for name in ("density", "epsilon"))
                if 0 < density < 1 and epsilon >= min(density, 1 - density):
                    return Refusal(
                        f"{self.name} keeps elements with probabilities from density - epsilon to density + epsilon,"
                        f" here {density - epsilon:g} to {density + epsilon:g} for {output.name}: they must be between"
                        " 0 and 1",
                        "epsilon",
                    )
        return None

    def step(self, output):
        return row_length(output.shape)

    def sparsify(self, inputs, source):
        parameters = inputs.output.source_parameters[source]
        return by_ranked_chance(inputs, source, parameters["density"], parameters["epsilon"])


METHOD = DellaLinear()
