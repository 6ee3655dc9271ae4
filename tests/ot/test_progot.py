"""``progot`` against the algorithm as the paper states it, in float64; and what its own options mean."""

from __future__ import annotations

import math

import numpy as np
import ot
import pytest
import torch

from deus_merge.core.errors import SolverError
from deus_merge.ot.costs import PointCost
from deus_merge.ot.problem import OTProblem, SolverOptions
from deus_merge.ot.solvers.progot import SOLVER, ProgOT


def clouds(n: int = 40, m: int = 50, d: int = 3):
    g = torch.Generator().manual_seed(11)
    x = torch.randn(n, d, generator=g, dtype=torch.float64)
    return x, 2 * torch.randn(m, d, generator=g, dtype=torch.float64) + 1


def textbook(x, y, a, b, reg, stages, schedule):
    """Algorithm 2 of arXiv 2406.05061 for h(z) = |z|², with the alphas of its table 1; every stage by POT."""
    alphas = {
        "linear": [1 / (stages - k) for k in range(stages)],
        "exponential": [1 / math.e] * stages,
        "quadratic": [(2 * k + 1) / (stages**2 - k**2) for k in range(stages)],
    }[schedule]
    come = 1 - np.cumprod([1.0] + [1 - alpha for alpha in alphas[:-1]])  # the share of the way before each stage
    start = (a[:, None] * b[None] * ot.dist(x, y)).sum() / 20
    for alpha, t in zip(alphas, come, strict=True):
        level = reg if stages == 1 else start + (reg - start) * t / come[-1]
        plan = ot.bregman.sinkhorn_log(a, b, ot.dist(x, y), level, numItermax=20_000, stopThr=1e-12)
        x = (1 - alpha) * x + alpha * (plan @ y) / plan.sum(1, keepdims=True)
    return plan


STAGES = [1, 2, pytest.param(5, marks=pytest.mark.slow)]


@pytest.mark.parametrize("schedule", ["linear", "exponential", "quadratic"])
@pytest.mark.parametrize("stages", STAGES)
def test_progot_is_the_textbook_algorithm(schedule, stages):
    x, y = clouds()
    a = torch.rand(len(x), generator=torch.Generator().manual_seed(3), dtype=torch.float64) + 0.1
    problem = OTProblem(
        PointCost(x, y, cost="sqeuclidean"), a / a.sum(), torch.full((len(y),), 1 / len(y), dtype=torch.float64)
    )
    reg = 0.3
    want = textbook(*(t.numpy() for t in (x, y, problem.a, problem.b)), reg, stages, schedule)
    solver = ProgOT(progot_steps=stages, progot_schedule=schedule)
    got = solver.solve(problem, SolverOptions(reg=reg, tolerance=1e-12))
    assert got.converged and got.reg == pytest.approx(reg)
    assert np.abs(got.coupling.matrix.numpy() - want).sum() < 1e-8
    single = OTProblem(PointCost(x.float(), y.float(), cost="sqeuclidean"), problem.a.float(), problem.b.float())
    got = solver.solve(single, SolverOptions(reg=reg, tolerance=2e-6))
    assert np.abs(got.coupling.matrix.numpy() - want).sum() < 3e-4


@pytest.mark.parametrize("scale", ["none", "max", "median"])
def test_reg_has_the_unit_of_the_scaled_squared_distance(scale):
    """Whatever the problem's own cost, its scale and the scale of its points."""
    x, y = clouds()
    plans = []
    for cost in ("sqeuclidean", "euclidean"):
        for factor in (1, 100):
            problem = OTProblem.uniform(PointCost(factor * x, factor * y, cost=cost, cost_scale=scale))
            reg = 0.02 * (factor**2 if scale == "none" else 1)
            solution = SOLVER.solve(problem, SolverOptions(reg=reg))
            assert solution.transport_cost == pytest.approx(
                (solution.coupling.matrix * problem.cost.dense()).sum().item()
            )
            plans.append(solution.coupling.matrix)
    for plan in plans[1:]:
        assert (plan - plans[0]).abs().sum() < 1e-3


@pytest.mark.parametrize("spread", [1.0, 1.7])
def test_reg_auto_makes_the_map_of_y_to_itself_the_identity_and_no_smaller(spread):
    x, y = clouds(m=300)
    y = y * torch.tensor([1.0, spread, spread**2], dtype=y.dtype)  # another place between two halvings
    reg = SOLVER.solve(OTProblem.uniform(PointCost(x, y, cost="sqeuclidean"))).reg
    twins = OTProblem.uniform(PointCost(y, y, cost="sqeuclidean"))

    def off(reg: float) -> float:
        plan = ProgOT(progot_steps=1).solve(twins, SolverOptions(reg=reg, tolerance=1e-6)).coupling.transport_map()
        return ((plan.to_rows(y) - y).square().sum() / (y - y.mean(0)).square().sum()).sqrt().item()

    assert off(reg) <= 0.0101
    assert off(2 * reg) > 0.01


def test_progot_says_what_it_needs():
    x, y = clouds()
    points = OTProblem.uniform(PointCost(x, y))
    with pytest.raises(SolverError, match="moves the points themselves\n.*\n.*\n.*sinkhorn"):
        SOLVER.solve(OTProblem.uniform(torch.rand(3, 3)))
    with pytest.raises(SolverError, match="did you mean 'linear'"):
        ProgOT(progot_schedule="liner").solve(points)
    with pytest.raises(SolverError, match="progot_steps"):
        ProgOT(progot_steps=0).solve(points)
    with pytest.raises(SolverError, match="reg must be positive"):
        SOLVER.solve(points, SolverOptions(reg=-1.0))
