"""Entropic transport with relaxed marginals: points that match nothing may keep their mass.

The plan minimises, over all T >= 0,

    <T, C> + reg KL(T | a bᵀ) + rho KL(T 1 | a) + rho KL(Tᵀ 1 | b),     KL(x | y) = Σ x log(x/y) - x + y

(Chizat et al. 2018, arXiv 1607.05816), with rho = `Unbalanced.marginal_penalty` times the problem's mean cost. It is
solved as `sinkhorn` solves the balanced problem, to which it tends as rho grows: see `_semidual`. (POT's
``sinkhorn_stabilized_unbalanced`` loses its kernel to underflow where C/reg passes some hundreds in float32, and a step
of it shortens the error by no more than rho/(rho + reg).)

The solution is T divided by its total mass, so that a `Coupling` means the same for every solver; the mass itself is
`OTSolution.mass`. Column s of the coupling holds b_s of the mass where it matches like the average, less where it
matches badly. A column that keeps less than a millionth of b_s is set to zero. `Coupling.unmatched` names such columns:
a `TransportMap` has no mean for them, so alignments keep B's own rows there.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

from ...core.errors import SolverError
from ...core.parameters import block_parameter, parse_positive
from ..problem import DEFAULT_OPTIONS, OTProblem, OTSolution, SolverOptions
from ..solver import OTSolver
from ._semidual import Kernel
from ._steps import Placement, check_reg, mean_cost, solve


@dataclass(frozen=True)
class Unbalanced(OTSolver):
    """The solver ``unbalanced``; ``reg: auto`` counts support as for ``sinkhorn``, over the columns that keep mass.

    Attributes:
        marginal_penalty: The weight rho of KL(T1|a) + KL(Tᵀ1|b), as a multiple of the problem's mean cost
            Σ a_r b_s |C_rs|, so that it means the same at any scale of the cost. 1 lets points that cost about the mean
            lose some of their mass; plans keep their marginals as it grows.
    """

    marginal_penalty: float = 1.0

    name = "unbalanced"
    summary = "entropic, relaxed marginals: rows that match nothing are left out; any device"
    reference = "Chizat et al. 2018, arXiv 1607.05816; Séjourné et al. 2022, arXiv 2201.00730"
    parameters = (
        block_parameter("marginal_penalty", "other", 1.0,
                        "solver unbalanced: weight of the marginals, in units of the mean cost", parse=parse_positive),
    )  # fmt: skip
    keeps_marginals = False

    def solve(self, problem: OTProblem, options: SolverOptions = DEFAULT_OPTIONS) -> OTSolution:
        """Solve by annealed Sinkhorn and Newton steps; see `OTSolver.solve` for the arguments.

        Returns:
            The plan of total mass 1. ``converged`` means that its columns are those of the fixed point: their L1
            distance is within the tolerance. ``marginal_error`` is the distance of the plan from a and b.

        Raises:
            SolverError: reg is neither positive nor "auto", or marginal_penalty is not positive.
        """
        check_reg(options.reg)
        penalty = self.marginal_penalty
        if not (isinstance(penalty, (int, float)) and math.isfinite(penalty) and penalty > 0):
            raise SolverError(
                "marginal_penalty must be positive",
                expected="a number above 0, of mean costs",
                got=repr(penalty),
                hint="for plans that keep their marginals use `solver: sinkhorn`",
            )
        start = time.perf_counter()
        placement = Placement.of(problem)
        kernel = Kernel(placement.take(problem), options)  # from here on the cost respects the memory limit
        kernel.penalty = penalty * (mean_cost(kernel.problem) or 1.0)
        state, reg = solve(kernel, options)
        return OTSolution.of(
            problem,
            placement.place(kernel.plan(state)),
            options,
            started=start,
            iterations=kernel.passes,
            reg=reg,
            finished=state.error <= options.tolerance,
            mass=math.exp(min(state.log_mass, 700.0)),
        )


SOLVER = Unbalanced()
