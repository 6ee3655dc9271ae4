"""Exact optimal transport by network simplex: POT's ``ot.emd``. For n up to a few thousand."""

from __future__ import annotations

import time
import warnings

from ..coupling import Coupling
from ..problem import OTProblem, OTSolution, SolverOptions

_DEFAULTS = SolverOptions()

_NO_LIMIT = 1_000_000_000  # simplex pivots are not passes over the kernel: `max_iterations` does not count them


class Emd:
    """The solver ``emd``; ``reg`` and ``max_iterations`` do not apply."""

    name = "emd"
    summary = "exact, network simplex; CPU, n up to a few thousand"
    reference = "Bonneel et al. 2011; POT: Flamary et al. 2021"
    needs_points = False
    keeps_marginals = True

    def solve(self, problem: OTProblem, options: SolverOptions = _DEFAULTS) -> OTSolution:
        """Solve exactly; see `OTSolver.solve` for the arguments."""
        import ot
        import torch

        start = time.perf_counter()
        problem = problem.stored()
        cost = problem.cost
        # The simplex works in float64, and wants sums that agree to its own rounding.
        a, b = (x.double().cpu().numpy() for x in (problem.a, problem.b))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its state is in the log, and in our solution
            plan, log = ot.emd(a / a.sum(), b / b.sum(), cost.double().cpu().numpy(), numItermax=_NO_LIMIT, log=True)
        coupling = Coupling(torch.from_numpy(plan).to(cost))  # (n, m)
        return OTSolution.of(problem, coupling, options, started=start, finished=log["warning"] is None)


SOLVER = Emd()
