"""Progressive entropic transport: the points move towards their targets in stages, at a falling reg.

Algorithm 2 of Kassraie et al. 2024 (arXiv 2406.05061) for the squared Euclidean cost. Before stage k the points have
come the share t_k of their way. A stage solves entropic transport from where they are, x, to y, and moves every point
by the share alpha_k of what is left along the entropic map T, which is the plan's mean of y:

    x <- (1 - alpha_k) x + alpha_k T(x),     1 - t_{k+1} = (1 - t_k)(1 - alpha_k),     reg_k between reg_0 and reg_K

The plan of the last stage is the coupling. Duals of one stage, times 1 - alpha_k, start the next. The schedules, for K
stages, k = 0 .. K-1 (the paper's constant speed, deceleration and acceleration):

- ``linear``: t_k = k/K;
- ``exponential``: t_k = 1 - (1 - 1/e)^k, every alpha_k is 1/e;
- ``quadratic``: t_k = (k/K)².

reg goes down from a twentieth of the mean squared distance to the end reg in proportion to the way that is left. The
end reg is `SolverOptions.reg`, in units of the squared distance scaled as the problem's cost is (by the squared
distances' own maximum or median; halved for ``cosine``, which is half the squared distance of unit rows). With "auto"
it is chosen by self-transport, as in the paper's section 4: y is transported to itself, where the right map is the
identity. An entropic map is blurred, less so the smaller reg is: the largest reg of a halving sequence is taken at
which the map is off by no more than 1 % (root mean square, of the spread of y). Between clouds that hardly resemble
each other, such as random rows of high dimension, plans at that reg average most rows: give a smaller reg there.
"""

from __future__ import annotations

import math
import time
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING

from ...core.errors import SolverError, nearest
from ..costs import PointCost
from ..coupling import Coupling
from ..problem import OTProblem, OTSolution, SolverOptions
from ._semidual import Kernel
from ._steps import anneal, check_reg, solve_level, spread, spread_out

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

_DEFAULTS = SolverOptions()
_FIRST = 1 / 20  # reg of the first stage, in mean squared distances
_STAGE_ERROR = 10.0  # L1 marginal error of the stages before the last, in tolerances
_SELF_ERROR = 1e-3  # and of self-transport
_SAMPLE = 1024  # rows of y that choose the reg
_BLUR = 0.01  # how far from the identity the self-transport of y may be
_HALVINGS = 20

#: schedule -> t_k from (k, K)
SCHEDULES: dict[str, Callable[[int, int], float]] = {
    "linear": lambda k, stages: k / stages,
    "exponential": lambda k, stages: 1 - (1 - 1 / math.e) ** k,
    "quadratic": lambda k, stages: (k / stages) ** 2,
}


class ProgOT:
    """The solver ``progot``."""

    name = "progot"
    summary = "entropic, progressive: the points themselves move, at a falling reg; any device"
    reference = "Kassraie et al. 2024, arXiv 2406.05061"
    needs_points = True
    keeps_marginals = True

    def solve(self, problem: OTProblem, options: SolverOptions = _DEFAULTS) -> OTSolution:
        """Solve in stages; see `OTSolver.solve` for the arguments.

        Returns:
            The plan of the last stage. ``transport_cost`` is of the problem's own cost, ``reg`` is the end reg, and
            ``iterations`` counts the passes of all stages and of the choice of reg.

        Raises:
            SolverError: the cost is not a `PointCost` that keeps its points; or a wrong reg, number of steps or
                schedule.
        """
        _check(problem, options)
        start = time.perf_counter()
        problem.keep(0)  # the stages have costs of their own
        x, y, a, b, place = _with_mass(problem)
        unit = _unit(problem.cost)
        kernel = Kernel(_stage(x, y, a, b), options)
        last = float(options.reg) * unit if options.reg != "auto" else _self_transport_reg(y, b, kernel)
        g, level = spread(kernel.problem)
        first = max(last, _FIRST * _mean_cost(kernel.problem))
        times = [SCHEDULES[options.progot_schedule](k, options.progot_steps) for k in range(options.progot_steps)]
        for now, then in pairwise([*times, None]):
            reg = last if then is None else first + (last - first) * now / times[-1]
            g = anneal(kernel, g, level, reg, options.tolerance)
            state = solve_level(kernel, g, reg, (0.95 if then is None else _STAGE_ERROR) * options.tolerance)
            if then is not None:
                alpha = (then - now) / (1 - now)
                x = x + alpha * (kernel.mean_rows(state, y) - x)  # (n, d)
                g, level = (1 - alpha) * state.dual(reg), reg
                kernel.move(_stage(x, y, a, b))
        coupling, passes = place(kernel.plan(state)), kernel.passes
        del kernel, state  # and the last stage's cost, if the plan does without
        return OTSolution.of(problem, coupling, options, started=start, iterations=passes, reg=last / unit)


def _stage(x: Tensor, y: Tensor, a: Tensor, b: Tensor) -> OTProblem:
    """Transport of x (n, d) to y (m, d) at squared distances."""
    return OTProblem(PointCost(x, y, cost="sqeuclidean"), a, b)


def _unit(cost: PointCost) -> float:
    """The squared distance that is 1 in units of reg."""
    return {"euclidean": cost.scale**2, "sqeuclidean": cost.scale, "cosine": 2 * cost.scale}[cost.name]


def _mean_cost(problem: OTProblem) -> float:
    """Σ a_r b_s C_rs."""
    return sum(problem.a[rows].double().dot((c @ problem.b).double()).item() for rows, c in problem.blocks())


def _self_transport_reg(y: Tensor, b: Tensor, kernel: Kernel) -> float:
    """The largest reg at which y (m, d) goes to itself; its passes are added to those of ``kernel``."""
    sample = slice(None, None, -(-len(y) // _SAMPLE))
    y, b = y[sample], b[sample] / b[sample].sum()
    problem = _stage(y, y, b, b)
    mean = _mean_cost(problem)  # twice the variance
    inner = Kernel(problem, SolverOptions(max_iterations=kernel.max_passes))
    reg = _FIRST * mean or 1.0
    g, level = spread(problem)
    for _ in range(_HALVINGS):
        g = anneal(inner, g, level, reg, _SELF_ERROR)
        state = solve_level(inner, g, reg, _SELF_ERROR)
        off = (inner.mean_rows(state, y) - y).square().sum(1)  # (m,)
        if b.dot(off).item() <= _BLUR**2 * mean / 2 or inner.spent:
            break
        g, level, reg = state.dual(reg), reg, reg / 2
    kernel.passes += inner.passes
    return reg


def _with_mass(problem: OTProblem) -> tuple[Tensor, Tensor, Tensor, Tensor, Callable[[Coupling], Coupling]]:
    """x, y, a, b without the points that have no mass, and the function that puts a plan back among the others."""
    x, y = problem.cost.points
    rows, columns = problem.a > 0, problem.b > 0  # (n,), (m,)
    if bool(rows.all()) and bool(columns.all()):
        return x, y, problem.a, problem.b, lambda plan: plan
    return x[rows], y[columns], problem.a[rows], problem.b[columns], partial(spread_out, rows=rows, columns=columns)


def _check(problem: OTProblem, options: SolverOptions) -> None:
    check_reg(options.reg)
    if not isinstance(problem.cost, PointCost):
        raise SolverError(
            "progot moves the points themselves",
            expected="a PointCost that keeps its points",
            got="a cost matrix",
            hint="use `solver: sinkhorn`",
        )
    if not isinstance(options.progot_steps, int) or options.progot_steps < 1:
        raise SolverError("progot_steps must be positive", expected="a whole number", got=repr(options.progot_steps))
    got, known = options.progot_schedule, tuple(SCHEDULES)
    if got not in known:
        raise SolverError("unknown progot_schedule", expected=" | ".join(known), got=got, hint=nearest(got, known))


SOLVER = ProgOT()
