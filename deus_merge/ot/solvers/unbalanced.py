"""Entropic transport with relaxed marginals: points that match nothing may keep their mass.

The plan minimises, over all T >= 0,

    <T, C> + reg KL(T | a bᵀ) + rho KL(T 1 | a) + rho KL(Tᵀ 1 | b),     KL(x | y) = Σ x log(x/y) - x + y

(Chizat et al. 2018, arXiv 1607.05816), with rho = `SolverOptions.marginal_penalty` times the problem's mean cost. It is
solved as `sinkhorn` solves the balanced problem, to which it tends as rho grows: see `_semidual`. (POT's
``sinkhorn_stabilized_unbalanced`` loses its kernel to underflow where C/reg passes some hundreds in float32, and a step
of it shortens the error by no more than rho/(rho + reg).)

What comes back is T divided by its total mass, so that a `Coupling` means the same whoever made it; the mass itself is
`OTSolution.mass`. Column s of the coupling holds b_s of the mass where it matches like the average, less where it
matches badly. A column that keeps less than a millionth of b_s keeps none: it is zero, exactly. A `TransportMap` has
no mean for it and gives zeros; its `unmatched` names such columns, and whoever fuses keeps B's own row there.
"""

from __future__ import annotations

import math
import time

from ...core.errors import SolverError
from ..coupling import row_blocks
from ..problem import OTProblem, OTSolution, SolverOptions
from ._semidual import Kernel
from ._steps import check_reg, solve, with_mass

_DEFAULTS = SolverOptions()


class Unbalanced:
    """The solver ``unbalanced``; ``reg: auto`` counts support as for ``sinkhorn``, over the columns that keep mass."""

    name = "unbalanced"
    summary = "entropic, relaxed marginals: what matches nothing keeps its mass; any device"
    reference = "Chizat et al. 2018, arXiv 1607.05816; Séjourné et al. 2022, arXiv 2201.00730"
    needs_points = False
    keeps_marginals = False

    def solve(self, problem: OTProblem, options: SolverOptions = _DEFAULTS) -> OTSolution:
        """Solve by annealed Sinkhorn and Newton steps; see `OTSolver.solve` for the arguments.

        Returns:
            The plan of total mass 1. ``converged`` tells that its columns are those of the fixed point: their L1
            distance is within the tolerance. ``marginal_error`` is how far the plan is from a and b.

        Raises:
            SolverError: reg is neither positive nor "auto", or marginal_penalty is not positive.
        """
        check_reg(options.reg)
        penalty = options.marginal_penalty
        if not (isinstance(penalty, (int, float)) and math.isfinite(penalty) and penalty > 0):
            raise SolverError(
                "marginal_penalty must be positive",
                expected="a number above 0, of mean costs",
                got=repr(penalty),
                hint="for plans that keep their marginals use `solver: sinkhorn`",
            )
        start = time.perf_counter()
        inner, place = with_mass(problem)
        kernel = Kernel(inner, options)  # from here on the cost keeps to the memory
        kernel.penalty = penalty * _mean_cost(inner)
        state, reg = solve(kernel, options)
        return OTSolution.of(
            problem,
            place(kernel.plan(state)),
            options,
            started=start,
            iterations=kernel.passes,
            reg=reg,
            finished=state.error <= options.tolerance,
            mass=math.exp(min(state.log_mass, 700.0)),
        )


def _mean_cost(problem: OTProblem) -> float:
    """Σ a_r b_s |C_rs|, or 1 where that is 0."""
    total = 0.0
    for rows, cost in problem.blocks():
        total += sum(
            problem.a[rows][p].double().dot((cost[p].abs() @ problem.b).double()).item()
            for p in row_blocks(*cost.shape)
        )
    return total or 1.0


SOLVER = Unbalanced()
