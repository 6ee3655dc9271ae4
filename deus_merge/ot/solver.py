"""The base class of solvers: each is one file in ``ot/solvers/``, whose name is its name in a recipe."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from ..core.parameters import Parameter
from .problem import DEFAULT_OPTIONS, OTProblem, OTSolution, SolverOptions


@dataclass(frozen=True)
class OTSolver(ABC):
    """An optimal transport solver; its module defines one with default options as ``SOLVER``.

    A solver with options of its own is a frozen dataclass that has a field for every one of its `parameters`, with the
    same name and default: ``replace(SOLVER, progot_steps=3)``. Options that all solvers share are `SolverOptions`.

    Attributes:
        name: The module's name.
        summary: One line for ``deus-merge methods``.
        reference: Where it was published.
        parameters: The solver's own options, as recipes set them. Their scope is ``block``; the names are shared with
            all solvers and methods, so they should begin with or hint at the solver's name.
        needs_points: Whether it reads the points themselves: a `PointCost` must keep them.
        lazy_points: Whether it takes no longer where their rows are made when they are needed (`points.LazyPoints`);
            others get them in memory.
        keeps_marginals: Whether its plans have the marginals a and b, to the tolerance. A solver with relaxed marginals
            sets `Coupling.unmatched`.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    reference: ClassVar[str]
    parameters: ClassVar[tuple[Parameter, ...]] = ()
    needs_points: ClassVar[bool] = False
    lazy_points: ClassVar[bool] = False
    keeps_marginals: ClassVar[bool] = True

    @abstractmethod
    def solve(self, problem: OTProblem, options: SolverOptions = DEFAULT_OPTIONS) -> OTSolution:
        """Solve one problem.

        Args:
            problem: The costs and masses.
            options: How hard to solve; an option that does not apply to a solver is ignored.

        Raises:
            SolverError: the solver does not handle such problems, or an option has a value that it cannot use.
        """

    def configured(self, values: Mapping[str, object]) -> OTSolver:
        """This solver with its own options set.

        Args:
            values: Option values by name, at least those of `parameters`; others are ignored.
        """
        return replace(self, **{p.name: values[p.name] for p in self.parameters})

    def stored_bytes(self, itemsize: int) -> int:
        """Bytes per entry of an n x m cost that the solver needs whatever `SolverOptions.memory` says.

        Args:
            itemsize: Bytes of one entry in the dtype of the cost.
        """
        return 0
