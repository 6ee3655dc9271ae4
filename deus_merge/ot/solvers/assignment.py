"""Exact transport between equally many points of equal mass, a permutation: SciPy's ``linear_sum_assignment``."""

from __future__ import annotations

import time

from ...errors import SolverError
from ..coupling import PermutationCoupling
from ..problem import OTProblem, OTSolution, SolverOptions

_DEFAULTS = SolverOptions()


class Assignment:
    """The solver ``assignment``; ``reg`` and ``max_iterations`` do not apply."""

    name = "assignment"
    summary = "exact one-to-one matching for uniform square problems; CPU"
    reference = "Crouse 2016, IEEE TAES 52(4); SciPy"
    needs_points = False

    def solve(self, problem: OTProblem, options: SolverOptions = _DEFAULTS) -> OTSolution:
        """Solve exactly; see `OTSolver.solve` for the arguments.

        Raises:
            SolverError: not a square problem with uniform marginals.
        """
        import torch
        from scipy.optimize import linear_sum_assignment

        if not problem.is_uniform_square:
            raise SolverError(
                "assignment matches equally many rows of equal mass",
                expected="a square cost and uniform marginals",
                got=f"cost {tuple(problem.cost.shape)}",
                hint="use `solver: emd`",
            )
        start = time.perf_counter()
        problem = problem.stored()
        cost = problem.cost
        _, columns = linear_sum_assignment(cost.cpu().numpy())
        rows = torch.from_numpy(columns).argsort().to(cost.device)  # (n,)
        return OTSolution.of(problem, PermutationCoupling(rows, cost), options, started=start)


SOLVER = Assignment()
