"""Entropic optimal transport that stays finite and converges at small regularisation, in torch on any device.

The method is described in `_semidual` (the dual, memory) and `_steps` (annealing, Sinkhorn and Newton steps).
"""

from __future__ import annotations

import time

from ..problem import DEFAULT_OPTIONS, OTProblem, OTSolution, SolverOptions
from ..solver import OTSolver
from ._semidual import Kernel
from ._steps import Placement, check_reg, solve


class Sinkhorn(OTSolver):
    """The solver ``sinkhorn``."""

    name = "sinkhorn"
    summary = "entropic, stabilised, Sinkhorn and Newton steps; any device"
    reference = "Cuturi 2013, arXiv 1306.0895; Tang et al. 2024, arXiv 2401.12253"

    def solve(self, problem: OTProblem, options: SolverOptions = DEFAULT_OPTIONS) -> OTSolution:
        """Solve by annealed Sinkhorn and Newton steps; see `OTSolver.solve` for the arguments.

        Raises:
            SolverError: reg is neither positive nor "auto".
        """
        check_reg(options.reg)
        start = time.perf_counter()
        placement = Placement.of(problem)
        kernel = Kernel(placement.take(problem), options)
        state, reg = solve(kernel, options)
        coupling = placement.place(kernel.plan(state))
        return OTSolution.of(problem, coupling, options, started=start, iterations=kernel.passes, reg=reg)


SOLVER = Sinkhorn()
