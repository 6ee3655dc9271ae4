"""Entropic optimal transport that stays finite and converges at small regularisation, in torch on any device.

The method is told in `_semidual` (the dual, memory) and `_steps` (annealing, Sinkhorn and Newton steps).
"""

from __future__ import annotations

import time

from ..problem import OTProblem, OTSolution, SolverOptions
from ._semidual import Kernel
from ._steps import check_reg, solve, with_mass

_DEFAULTS = SolverOptions()


class Sinkhorn:
    """The solver ``sinkhorn``."""

    name = "sinkhorn"
    summary = "entropic, stabilised, Sinkhorn and Newton steps; any device"
    reference = "Cuturi 2013, arXiv 1306.0895; Tang et al. 2024, arXiv 2401.12253"
    needs_points = False
    keeps_marginals = True

    def solve(self, problem: OTProblem, options: SolverOptions = _DEFAULTS) -> OTSolution:
        """Solve by annealed Sinkhorn and Newton steps; see `OTSolver.solve` for the arguments.

        Raises:
            SolverError: reg is neither positive nor "auto".
        """
        check_reg(options.reg)
        start = time.perf_counter()
        inner, place = with_mass(problem)
        kernel = Kernel(inner, options)
        state, reg = solve(kernel, options)
        coupling = place(kernel.plan(state))
        return OTSolution.of(problem, coupling, options, started=start, iterations=kernel.passes, reg=reg)


SOLVER = Sinkhorn()
