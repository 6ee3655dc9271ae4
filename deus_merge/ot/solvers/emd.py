"""Exact optimal transport by network simplex: POT's ``ot.emd``. For n up to a few thousand."""

from __future__ import annotations

import time
import warnings

from ..coupling import Coupling
from ..problem import DEFAULT_OPTIONS, OTProblem, OTSolution, SolverOptions
from ..solver import OTSolver

_NO_LIMIT = 1_000_000_000  # simplex pivots are not passes over the kernel: `max_iterations` does not count them


class Emd(OTSolver):
    """The solver ``emd``; ``reg`` and ``max_iterations`` do not apply."""

    name = "emd"
    summary = "exact, network simplex; CPU, n up to a few thousand"
    reference = "Bonneel et al. 2011; POT: Flamary et al. 2021"

    def solve(self, problem: OTProblem, options: SolverOptions = DEFAULT_OPTIONS) -> OTSolution:
        """Solve exactly; see `OTSolver.solve` for the arguments."""
        import ot.lp
        import torch

        start = time.perf_counter()
        problem = problem.stored()
        cost = problem.matrix  # (n, m)
        # The simplex works in float64, and its input must have sums that agree to that rounding.
        a, b = (x.double().cpu().numpy() for x in (problem.a, problem.b))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its state is in the log, and in our solution
            plan, log = ot.lp.emd(a / a.sum(), b / b.sum(), cost.double().cpu().numpy(), numItermax=_NO_LIMIT, log=True)
        coupling = Coupling(torch.from_numpy(plan).to(cost))  # (n, m)
        return OTSolution.of(problem, coupling, options, started=start, finished=log["warning"] is None)

    def stored_bytes(self, itemsize: int) -> int:
        """POT needs the cost in memory, again in float64, and returns the plan in float64."""
        return itemsize + 2 * 8


SOLVER = Emd()
