"""Progressive entropic transport: the points move towards their targets in stages, at a falling reg.

Algorithm 2 of Kassraie et al. 2024 (arXiv 2406.05061) for the squared Euclidean cost. Before stage k the points have
covered the share t_k of their way. A stage solves entropic transport from the present points x to y, and moves every
point by the share alpha_k of the rest of its way along the entropic map T, which is the plan's mean of y:

    x <- (1 - alpha_k) x + alpha_k T(x),     1 - t_{k+1} = (1 - t_k)(1 - alpha_k),     reg_k between reg_0 and reg_K

The plan of the last stage is the coupling. The duals of one stage, times 1 - alpha_k, start the next. The schedules,
for K stages, k = 0 .. K-1 (the paper's constant speed, deceleration and acceleration):

- ``linear``: t_k = k/K;
- ``exponential``: t_k = 1 - (1 - 1/e)^k, every alpha_k is 1/e;
- ``quadratic``: t_k = (k/K)².

reg falls from a twentieth of the mean squared distance to the end reg in proportion to the rest of the way. The end reg
is `SolverOptions.reg`, in units of the squared distance scaled as the problem's cost is (by the squared
distances' own maximum or median; halved for ``cosine``, which is half the squared distance of unit rows). With "auto"
it is chosen by self-transport, as in the paper's section 4: y is transported to itself, where the right map is the
identity. An entropic map is blurred, less so the smaller reg is: the result is the largest reg of a halving sequence at
which the map is off by at most 1 % (root mean square, of the spread of y). Between clouds that hardly resemble each
other, such as random rows of high dimension, plans at that reg average most rows: set a smaller reg there.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...core.errors import SolverError, nearest
from ...core.parameters import block_parameter
from ..costs import PointCost
from ..problem import DEFAULT_OPTIONS, OTProblem, OTSolution, SolverOptions
from ..solver import OTSolver
from ._semidual import Kernel
from ._steps import Placement, anneal, check_reg, mean_cost, solve_level, spread

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

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


@dataclass(frozen=True)
class ProgOT(OTSolver):
    """The solver ``progot``.

    Attributes:
        progot_steps: K, the number of stages, at least 1; the points move after every stage but the last.
        progot_schedule: One of `SCHEDULES`: the share of their way that the points have covered before each stage.
    """

    progot_steps: int = 8
    progot_schedule: str = "linear"

    name = "progot"
    summary = "entropic, progressive: the points themselves move, at a falling reg; any device"
    reference = "Kassraie et al. 2024, arXiv 2406.05061"
    parameters = (
        block_parameter("progot_steps", "integer", 8, "stages of solver progot", minimum=1),
        block_parameter("progot_schedule", "choice", "linear", "step sizes of progot", choices=tuple(SCHEDULES)),
    )
    needs_points = True

    def solve(self, problem: OTProblem, options: SolverOptions = DEFAULT_OPTIONS) -> OTSolution:
        """Solve in stages; see `OTSolver.solve` for the arguments.

        Returns:
            The plan of the last stage. ``transport_cost`` is of the problem's own cost, ``reg`` is the end reg, and
            ``iterations`` counts the passes of all stages and of the choice of reg.

        Raises:
            SolverError: the cost is not a `PointCost` that keeps its points; or a wrong reg, number of steps or
                schedule.
        """
        cost = self._checked(problem, options)
        start = time.perf_counter()
        problem.keep(0)  # the stages have costs of their own
        placement = Placement.of(problem)
        x, y = cost.points  # (n, d), (m, d)
        if placement.rows is not None:
            x, y = x[placement.rows], y[placement.columns]
            stage = OTProblem(_distances(x, y), problem.a[placement.rows], problem.b[placement.columns])
        else:
            stage = problem.with_cost(_distances(x, y))
        unit = _unit(cost)
        kernel = Kernel(stage, options)
        del stage  # its cost is freed when the next stage begins
        last = float(options.reg) * unit if options.reg != "auto" else _self_transport_reg(y, kernel)
        g, level = spread(kernel.problem)
        first = max(last, _FIRST * mean_cost(kernel.problem))
        times = [SCHEDULES[self.progot_schedule](k, self.progot_steps) for k in range(self.progot_steps)]
        for now, then in zip(times, times[1:], strict=False):  # all stages but the last
            reg = first + (last - first) * now / times[-1]
            g = anneal(kernel, g, level, reg, options.tolerance)
            state = solve_level(kernel, g, reg, _STAGE_ERROR * options.tolerance)
            alpha = (then - now) / (1 - now)
            x = x + alpha * (kernel.mean_rows(state, y) - x)  # (n, d)
            g, level = (1 - alpha) * state.dual(reg), reg
            kernel.move(kernel.problem.with_cost(_distances(x, y)))
        g = anneal(kernel, g, level, last, options.tolerance)
        state = solve_level(kernel, g, last, 0.95 * options.tolerance)  # the plan's own sums round a little
        coupling, passes = placement.place(kernel.plan(state)), kernel.passes
        del kernel, state  # and the last stage's cost, if the plan does without
        return OTSolution.of(problem, coupling, options, started=start, iterations=passes, reg=last / unit)

    def _checked(self, problem: OTProblem, options: SolverOptions) -> PointCost:
        """The cost of the problem, once all options are known to be right."""
        check_reg(options.reg)
        if not isinstance(problem.cost, PointCost):
            raise SolverError(
                "progot moves the points themselves",
                expected="a PointCost that keeps its points",
                got="a cost matrix",
                hint="use `solver: sinkhorn`",
            )
        if not isinstance(self.progot_steps, int) or self.progot_steps < 1:
            raise SolverError("progot_steps must be positive", expected="a whole number", got=repr(self.progot_steps))
        got, known = self.progot_schedule, tuple(SCHEDULES)
        if got not in known:
            raise SolverError("unknown progot_schedule", expected=" | ".join(known), got=got, hint=nearest(got, known))
        return problem.cost


def _distances(x: Tensor, y: Tensor) -> PointCost:
    """Squared distances of x (n, d) to y (m, d)."""
    return PointCost(x, y, cost="sqeuclidean")


def _unit(cost: PointCost) -> float:
    """The squared distance that is 1 in units of reg."""
    return {"euclidean": cost.scale**2, "sqeuclidean": cost.scale, "cosine": 2 * cost.scale}[cost.name]


def _self_transport_reg(y: Tensor, kernel: Kernel) -> float:
    """The largest reg at which y (m, d) is mapped to itself; its passes are added to those of ``kernel``."""
    sample = slice(None, None, -(-len(y) // _SAMPLE))
    y, b = y[sample], kernel.b[sample] / kernel.b[sample].sum()
    problem = OTProblem(_distances(y, y), b, b)
    mean = mean_cost(problem)  # twice the variance
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


SOLVER = ProgOT()
