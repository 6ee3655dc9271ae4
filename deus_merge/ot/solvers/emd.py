"""Exact optimal transport by network simplex: POT's ``ot.emd``. For n up to a few thousand."""

from __future__ import annotations

import time
import warnings
from typing import Literal

from ..problem import Coupling, OTProblem, OTSolution

_NO_LIMIT = 1_000_000_000  # simplex pivots are not passes over the kernel: `max_iterations` does not count them


class Emd:
    """The solver ``emd``; ``reg`` and ``max_iterations`` do not apply."""

    name = "emd"
    summary = "exact, network simplex; CPU, n up to a few thousand"
    reference = "Bonneel et al. 2011; POT: Flamary et al. 2021"

    def solve(
        self,
        problem: OTProblem,
        *,
        reg: float | Literal["auto"] = "auto",
        max_iterations: int = 10_000,
        tolerance: float = 1e-4,
        target_support: float = 2.0,
    ) -> OTSolution:
        """Solve exactly; see `OTSolver.solve` for the arguments."""
        import ot
        import torch

        start = time.perf_counter()
        cost = problem.cost
        # The simplex works in float64, and wants sums that agree to its own rounding.
        a, b = (x.double().cpu().numpy() for x in (problem.a, problem.b))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its state is in the log, and in our solution
            plan, log = ot.emd(a / a.sum(), b / b.sum(), cost.double().cpu().numpy(), numItermax=_NO_LIMIT, log=True)
        coupling = Coupling(torch.from_numpy(plan).to(cost))  # (n, m)
        error = coupling.marginal_error(problem.a, problem.b)
        return OTSolution(
            coupling=coupling,
            iterations=0,
            marginal_error=error,
            transport_cost=coupling.transport_cost(cost),
            seconds=time.perf_counter() - start,
            converged=log["warning"] is None and error <= tolerance,
            reg=None,
            effective_support=coupling.effective_support(),
        )


SOLVER = Emd()
