"""``unbalanced`` against POT in float64, its optimality conditions, and the laws of relaxed marginals."""

from __future__ import annotations

import math

import numpy as np
import ot
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deus_merge.core.errors import SolverError
from deus_merge.ot.costs import cost_matrix
from deus_merge.ot.problem import OTProblem, SolverOptions
from deus_merge.ot.solvers import sinkhorn
from deus_merge.ot.solvers.unbalanced import SOLVER, Unbalanced


def problem_of(seed: int, n: int, m: int, dtype: torch.dtype = torch.float64) -> OTProblem:
    g = torch.Generator().manual_seed(seed)
    x, y = torch.randn(n, 3, generator=g, dtype=dtype), torch.randn(m, 3, generator=g, dtype=dtype) + 0.5
    a, b = torch.rand(n, generator=g, dtype=dtype) + 0.1, torch.rand(m, generator=g, dtype=dtype) + 0.1
    return OTProblem(cost_matrix(x, y), a / a.sum(), b / b.sum())


def mean_cost(problem: OTProblem) -> float:
    return (problem.a @ problem.cost @ problem.b).item()


@pytest.mark.parametrize("penalty", [0.05, 1.0, 20.0])
@pytest.mark.parametrize("reg", [1.0, 0.1])
def test_unbalanced_is_the_plan_of_pot(penalty, reg):
    problem = problem_of(1, 40, 30)
    a, b, cost = (t.numpy() for t in (problem.a, problem.b, problem.cost))
    rho = penalty * mean_cost(problem)
    want = ot.unbalanced.sinkhorn_unbalanced(a, b, cost, reg, rho, numItermax=50_000, stopThr=1e-14)
    got = Unbalanced(marginal_penalty=penalty).solve(problem, SolverOptions(reg=reg, tolerance=1e-12))
    assert got.converged and got.mass == pytest.approx(want.sum(), rel=1e-8)
    assert np.abs(got.mass * got.coupling.matrix.numpy() - want).sum() < 1e-8 * want.sum()
    single = OTProblem(problem.cost.float(), problem.a.float(), problem.b.float())
    got = Unbalanced(marginal_penalty=penalty).solve(single, SolverOptions(reg=reg, tolerance=2e-6))
    assert np.abs(got.mass * got.coupling.matrix.numpy() - want).sum() < 1e-4 * want.sum()


def test_the_penalty_is_in_units_of_the_mean_absolute_cost():
    problem = problem_of(1, 40, 30)
    problem = problem.with_cost(problem.cost - problem.cost.median())
    a, b, cost = (t.numpy() for t in (problem.a, problem.b, problem.cost))
    want = ot.unbalanced.sinkhorn_unbalanced(
        a, b, cost, 0.5, (a @ abs(cost) @ b).item(), numItermax=50_000, stopThr=1e-14
    )
    got = SOLVER.solve(problem, SolverOptions(reg=0.5, tolerance=1e-12))
    assert got.mass == pytest.approx(want.sum(), rel=1e-8)


@settings(deadline=None, max_examples=40)
@given(
    n=st.integers(1, 30),
    m=st.integers(1, 30),
    log_reg=st.floats(-3, 0),
    log_penalty=st.floats(-1.5, 3),
    seed=st.integers(0, 2**16),
)
def test_the_plan_meets_its_optimality_conditions(n, m, log_reg, log_penalty, seed):
    """T = a b exp((f + g - C)/reg), where the duals are those of its own marginals: f = -rho log(T1 / a)."""
    problem = problem_of(seed, n, m)
    reg, penalty = 10**log_reg * problem.cost.max().item(), 10**log_penalty
    solution = Unbalanced(marginal_penalty=penalty).solve(problem, SolverOptions(reg=reg, tolerance=1e-11))
    assert solution.converged and 0 < solution.mass <= 1 + 1e-9
    plan, rho = solution.mass * solution.coupling.matrix, penalty * mean_cost(problem)
    rows, columns = plan.sum(1), plan.sum(0)
    kept = columns > 0  # the others lost all but a millionth of their mass
    f, g = -rho * (rows / problem.a).log(), -rho * (columns / problem.b).log()
    want = problem.a[:, None] * problem.b * ((f[:, None] + g - problem.cost) / reg).exp()
    assert (plan - want)[:, kept].abs().sum() <= 1e-5 * solution.mass * max(1.0, rho / reg)


def test_the_balanced_plan_is_the_limit():
    problem = problem_of(5, 40, 40, torch.float32)
    reg = 0.01 * problem.cost.max().item()
    balanced = sinkhorn.SOLVER.solve(problem, SolverOptions(reg=reg, tolerance=1e-5))
    away, error = [], []
    for penalty in (0.1, 1.0, 10.0, 1e2, 1e3, 1e4):
        solution = Unbalanced(marginal_penalty=penalty).solve(problem, SolverOptions(reg=reg, tolerance=1e-5))
        assert solution.converged
        away.append((solution.coupling.matrix - balanced.coupling.matrix).abs().sum().item())
        error.append(solution.marginal_error)
    assert all(later < earlier for earlier, later in zip(error, error[1:], strict=False))
    assert away[0] > 0.5 and away[-1] < 1e-2 and error[-1] < 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_matches_nothing_keeps_its_mass(dtype):
    """Far columns end without mass, exactly; the map tells which, and the others' means are of near rows."""
    g = torch.Generator().manual_seed(2)
    x = torch.randn(50, 8, generator=g, dtype=dtype)
    y = torch.cat([x[:40] + 0.05 * torch.randn(40, 8, generator=g, dtype=dtype), x[:10] + 1e3])
    problem = OTProblem.uniform(cost_matrix(x, y))
    solution = Unbalanced(marginal_penalty=0.005).solve(problem, SolverOptions(reg=0.05))  # of a mean cost of about 570
    assert solution.converged
    plan = solution.coupling
    assert plan.matrix.sum().item() == pytest.approx(1, abs=1e-5)
    assert (plan.matrix[:, 40:] == 0).all()
    moved = plan.transport_map()
    assert torch.equal(moved.unmatched, torch.arange(50) >= 40)
    rows = moved.to_rows(x)
    assert torch.isfinite(rows).all() and (rows[40:] == 0).all()
    assert (rows[:40] - x[:40]).norm(dim=1).mean() < 0.1 * x.norm(dim=1).mean()
    assert torch.allclose(moved.matrix.sum(0)[:40], torch.ones(40, dtype=dtype), atol=1e-5)
    balanced = sinkhorn.SOLVER.solve(problem, SolverOptions(reg=0.1)).coupling.transport_map()
    assert balanced.unmatched is None


@pytest.mark.parametrize("solver", [Unbalanced(marginal_penalty=0.005), sinkhorn.SOLVER])
def test_points_without_mass_are_unmatched(solver):
    """Besides the columns that a relaxed plan leaves empty."""
    g = torch.Generator().manual_seed(2)
    x = torch.randn(50, 8, generator=g)
    y = torch.cat([x[:40] + 0.05 * torch.randn(40, 8, generator=g), x[:10] + 1e3])
    b = torch.ones(50)
    b[7] = 0
    solution = solver.solve(OTProblem(cost_matrix(x, y), torch.full((50,), 0.02), b / 49), SolverOptions(reg=0.05))
    empty = torch.arange(50) == 7
    if not solver.keeps_marginals:
        empty |= torch.arange(50) >= 40
    assert torch.equal(solution.coupling.unmatched, empty)
    assert torch.equal(solution.coupling.matrix.sum(0) == 0, empty)
    assert solution.effective_support >= 1


def test_small_reg_in_float32_where_pot_underflows():
    """Random rows at C/reg = 1000: POT's stabilised variant has no kernel left, ours agrees with its float64 dual."""
    g = torch.Generator().manual_seed(4)
    cost = cost_matrix(torch.randn(200, 64, generator=g), torch.randn(200, 64, generator=g), cost_scale="max")
    problem = OTProblem.uniform(cost)
    solution = Unbalanced(marginal_penalty=1.0).solve(problem, SolverOptions(reg=1e-3))
    assert solution.converged and torch.isfinite(solution.coupling.matrix).all()
    twice = OTProblem.uniform(cost.double())
    double = Unbalanced(marginal_penalty=1.0).solve(twice, SolverOptions(reg=1e-3, tolerance=1e-9))
    assert double.converged
    assert (solution.coupling.matrix - double.coupling.matrix).abs().sum() < 1e-2
    assert solution.mass == pytest.approx(double.mass, rel=1e-4)


@pytest.mark.parametrize("limit", [1, 3, 8])
@pytest.mark.parametrize("penalty", [1e-4, 1.0, 1e6])
def test_unbalanced_is_finite_wherever_it_has_to_stop(limit, penalty):
    cost = torch.exp(4 * torch.randn(40, 30, generator=torch.Generator().manual_seed(8)))
    options = SolverOptions(reg=1e-4, max_iterations=limit)
    solution = Unbalanced(marginal_penalty=penalty).solve(OTProblem.uniform(cost), options)
    assert torch.isfinite(solution.coupling.matrix).all() and solution.mass >= 0
    assert torch.isfinite(solution.coupling.transport_map().to_rows(torch.ones(40, 2))).all()


@pytest.mark.parametrize("penalty", [0.0, -1.0, math.nan, math.inf, "much"])
def test_a_penalty_that_is_none_is_refused(penalty):
    with pytest.raises(SolverError, match="marginal_penalty must be positive"):
        Unbalanced(marginal_penalty=penalty).solve(OTProblem.uniform(torch.rand(3, 3)), SolverOptions())
