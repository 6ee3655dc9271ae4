"""Every solver, by the name that recipes use: a file of ``ot/solvers/`` each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

from ..core.errors import SolverError, nearest
from ..core.parameters import Parameter
from ..core.plugins import plugins
from .solver import OTSolver


def solvers() -> Mapping[str, OTSolver]:
    """Every solver with its default options, by name."""
    return cast(Mapping[str, OTSolver], plugins("deus_merge.ot.solvers", "SOLVER"))


def solver(name: str) -> OTSolver:
    """One solver with its default options.

    Raises:
        SolverError: no solver has this name.
    """
    known = solvers()
    if name not in known:
        raise SolverError("unknown solver", expected=" | ".join(known), got=name, hint=nearest(name, known))
    return known[name]


def solver_parameters() -> tuple[Parameter, ...]:
    """The options that solvers declare for themselves, in the order of the solvers' names."""
    return tuple(parameter for one in solvers().values() for parameter in one.parameters)
