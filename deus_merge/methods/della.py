"""Drop by magnitude and chance, then merge by sign."""

from __future__ import annotations

from ._task_vectors import family_parameters
from .della_linear import EPSILON, DellaLinear


class Della(DellaLinear):
    name = "della"
    summary = "task vectors with random elements dropped, small ones more likely, merged where their signs agree"
    consensus = True
    parameters = family_parameters(EPSILON, normalize=True, rescale=True)


METHOD = Della()
