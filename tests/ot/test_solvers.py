"""Every solver x every problem with a known optimum; a new file in ``ot/solvers/`` joins by being there."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deus_merge.core.errors import SolverError
from deus_merge.ot.costs import PointCost, cost_matrix
from deus_merge.ot.problem import OTProblem, SolverOptions
from deus_merge.ot.registry import solvers
from deus_merge.ot.solvers.unbalanced import Unbalanced

SOLVERS = solvers()


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def planted(n: int = 60, noise: float = 0.0, weighted: bool = False, dtype: torch.dtype = torch.float32):
    """Rows, a permutation of them with noise: the optimum is the permutation, at the cost of the noise."""
    g = generator(1)
    x = torch.randn(n, 40, generator=g, dtype=dtype)
    order = torch.randperm(n, generator=g)
    cost = PointCost(x, x[order] + noise * torch.randn(n, 40, generator=g, dtype=dtype))
    a = torch.rand(n, generator=g, dtype=dtype) + 0.1 if weighted else torch.ones(n, dtype=dtype)
    a /= a.sum()
    plan = torch.zeros(n, n, dtype=dtype)
    plan[order, torch.arange(n)] = a[order]
    return OTProblem(cost, a, a[order]), (plan * cost.dense()).sum().item(), plan


def clustered(clusters: int = 5, size: int = 16):
    """Clusters apart from each other, shifted a little: every point stays in its cluster and goes to its twin."""
    g = generator(7)
    centres = 2 * torch.randn(clusters, 10, generator=g)
    x = (centres.unsqueeze(1) + torch.randn(clusters, size, 10, generator=g)).flatten(0, 1)  # (clusters * size, 10)
    order = torch.randperm(len(x), generator=g)
    cost = PointCost(x, x[order] + 0.3, cost="sqeuclidean")  # a shift is optimal for squared distances
    plan = torch.zeros(len(x), len(x))
    plan[order, torch.arange(len(x))] = 1 / len(x)
    return OTProblem.uniform(cost), (plan * cost.dense()).sum().item(), plan


def on_a_line(n: int = 40, m: int = 25):
    """Points on a line, convex cost, any weights: mass moves monotonically, so the optimum is known."""
    g = generator(2)
    x, y = torch.rand(n, 1, generator=g).sort(0).values, torch.rand(m, 1, generator=g).sort(0).values
    a, b = torch.rand(n, generator=g) + 0.1, torch.rand(m, generator=g) + 0.1
    a[3] = b[5] = 0  # points without mass
    a, b = a / a.sum(), b / b.sum()
    cost = PointCost(x, y, cost="sqeuclidean")
    cuts = torch.cat([a.cumsum(0), b.cumsum(0)]).clamp_max(1).sort().values
    masses = torch.diff(cuts, prepend=cuts.new_zeros(1))
    middle = cuts - masses / 2
    r = torch.searchsorted(a.cumsum(0), middle).clamp_max(n - 1)
    s = torch.searchsorted(b.cumsum(0), middle).clamp_max(m - 1)
    plan = torch.zeros(n, m).index_put((r, s), masses, accumulate=True)
    return OTProblem(cost, a, b), (plan * cost.dense()).sum().item(), plan


def constant(n: int = 6, m: int = 9):
    return OTProblem.uniform(torch.full((n, m), 3.0)), 3.0, None


def single():
    return OTProblem.uniform(PointCost(torch.zeros(1, 2), torch.full((1, 2), 3.0))), 18**0.5, torch.ones(1, 1)


def one_to_many():
    points = PointCost(torch.zeros(1, 1), torch.arange(5.0).unsqueeze(1))
    return OTProblem.uniform(points), 2.0, torch.full((1, 5), 0.2)


PROBLEMS = {
    "planted": planted,
    "planted with noise": lambda: planted(noise=0.2),
    "planted with noise, larger": lambda: planted(n=400, noise=0.5),
    "planted with noise, unequal weights": lambda: planted(noise=0.2, weighted=True),
    "planted with noise, float64": lambda: planted(noise=0.2, dtype=torch.float64),
    "clustered": clustered,
    "on a line": on_a_line,
    "constant cost": constant,
    "one point": single,
    "one to many": one_to_many,
}


def largest_cost(problem: OTProblem) -> float:
    return max(rows.max().item() for _, rows in problem.blocks())


def refused(solver, problem: OTProblem, options: SolverOptions):
    """The solution; None where the solver refuses, with a hint, what it may refuse."""
    try:
        return solver.solve(problem, options)
    except SolverError as refusal:
        assert refusal.hint
        assert solver.needs_points and not isinstance(problem.cost, PointCost) or not problem.is_uniform_square
        return None


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("problem", PROBLEMS)
def test_known_optimum(name, problem):
    solver, (problem, best, plan) = SOLVERS[name], PROBLEMS[problem]()
    largest = largest_cost(problem)
    # Relaxed plans meet the optimum where their marginals cost more than any transport.
    if name == "unbalanced":
        solver = Unbalanced(marginal_penalty=1e4)
    solution = refused(solver, problem, SolverOptions(reg=1e-3 * largest, tolerance=1e-5))
    if solution is None:
        return
    strict = solver.keeps_marginals
    assert solution.converged
    assert solution.marginal_error <= (1e-5 if strict else 2e-3)
    assert solution.coupling.marginal_error(problem.a, problem.b) == pytest.approx(solution.marginal_error, abs=1e-6)
    assert solution.coupling.matrix.min() >= 0
    assert solution.coupling.matrix.dtype == problem.cost.dtype
    assert solution.mass == 1 if strict else solution.mass <= 1
    assert solution.transport_cost == pytest.approx(best, rel=1e-2, abs=2e-3 * largest)
    assert solution.transport_cost >= best - (1e-4 if strict else 1e-3) * largest
    if plan is not None and problem.is_uniform_square:
        assert (solution.coupling.matrix - plan).abs().sum() < (1e-3 if strict else 3e-3)


@settings(deadline=None, max_examples=80)
@given(
    name=st.sampled_from(sorted(SOLVERS)),
    n=st.integers(1, 40),
    m=st.integers(1, 40),
    d=st.sampled_from([None, 1, 3, 30]),
    kind=st.sampled_from(["euclidean", "sqeuclidean", "cosine"]),
    scale=st.sampled_from(["none", "max", "median"]),
    reg=st.sampled_from(["auto", 0.3, 0.02, 1e-3]),
    power=st.sampled_from([1, 4]),
    seed=st.integers(0, 2**16),
)
def test_laws_of_a_coupling(name, n, m, d, kind, scale, reg, power, seed):
    """Mass 1, never negative, marginals as reported, no better than the optimum, the same plan twice."""
    g = generator(seed)
    if d is None:
        cost = torch.rand(n, m, generator=g) ** power
    else:
        x, y = torch.rand(n, d, generator=g) ** power, torch.rand(m, d, generator=g) ** power
        cost = PointCost(x, y, cost=kind, cost_scale=scale)
    a, b = torch.rand(n, generator=g) + 0.01, torch.rand(m, generator=g) + 0.01
    problem = OTProblem(cost, a / a.sum(), b / b.sum()) if seed % 2 else OTProblem.uniform(cost)
    one = refused(SOLVERS[name], problem, SolverOptions(reg=reg))
    if one is None:
        return
    plan = one.coupling.matrix
    assert torch.isfinite(plan).all() and (plan >= 0).all()
    assert plan.sum().item() == pytest.approx(1, abs=1e-5)
    assert 1 - 1e-4 <= one.effective_support <= n + 1e-3
    if SOLVERS[name].keeps_marginals:
        assert one.converged == (one.marginal_error <= 1e-4)
        # Float32 has no better plan where costs are thousands of reg, as under `reg: auto` they may be.
        assert one.converged or reg == "auto"
        exact = SOLVERS["emd"].solve(problem)
        slack = max(2e-4, one.marginal_error)  # mass at the wrong place may be that much cheaper
        assert one.transport_cost >= exact.transport_cost - slack * max(1, largest_cost(problem))
    assert torch.equal(plan, SOLVERS[name].solve(problem, SolverOptions(reg=reg)).coupling.matrix)


@pytest.mark.parametrize("reg", [1.0, 0.1, 0.02])
@pytest.mark.parametrize("shape", [(50, 50), (30, 70)])
def test_sinkhorn_is_the_float64_plan_to_rounding(reg, shape):
    """Against POT's log-domain Sinkhorn in float64."""
    import ot

    g = generator(3)
    x, y = torch.randn(shape[0], 8, generator=g), torch.randn(shape[1], 8, generator=g)
    cost = cost_matrix(x, y)
    cost /= cost.max()
    a, b = torch.rand(shape[0], generator=g) + 0.1, torch.rand(shape[1], generator=g) + 0.1
    a, b = a / a.sum(), b / b.sum()
    a64, b64 = (v.double().numpy() / v.double().sum().item() for v in (a, b))
    want = ot.bregman.sinkhorn_log(a64, b64, cost.double().numpy(), reg, numItermax=100_000, stopThr=1e-13)

    double = OTProblem(cost.double(), torch.from_numpy(a64), torch.from_numpy(b64))
    got = SOLVERS["sinkhorn"].solve(double, SolverOptions(reg=reg, tolerance=1e-12))
    assert got.converged
    assert np.abs(got.coupling.matrix.numpy() - want).sum() < 1e-9
    got = SOLVERS["sinkhorn"].solve(OTProblem(cost, a, b), SolverOptions(reg=reg, tolerance=2e-6))
    assert np.abs(got.coupling.matrix.numpy() - want).sum() < 5e-5


@settings(deadline=None, max_examples=30)
@given(
    log_ratio=st.floats(-1, 4),
    n=st.integers(2, 60),
    m=st.integers(2, 60),
    kind=st.sampled_from(["uniform", "outlier", "twins", "points", "heavy"]),
    seed=st.integers(0, 2**16),
)
def test_sinkhorn_is_finite_up_to_a_cost_of_ten_thousand_reg(log_ratio, n, m, kind, seed):
    g = generator(seed)
    cost = torch.rand(n, m, generator=g)
    if kind == "outlier":
        cost[0] += 30
        cost[:, -1] += 50
    elif kind == "twins":
        cost = cost[torch.randint(n, (n,), generator=g)][:, torch.randint(m, (m,), generator=g)]
    elif kind == "points":
        cost = cost_matrix(torch.randn(n, 2, generator=g), torch.randn(m, 2, generator=g))
    elif kind == "heavy":
        cost = torch.exp(4 * torch.randn(n, m, generator=g))
    problem = OTProblem.uniform(cost)
    solution = SOLVERS["sinkhorn"].solve(problem, SolverOptions(reg=cost.max().item() / 10**log_ratio))
    plan = solution.coupling.matrix
    assert torch.isfinite(plan).all() and math.isfinite(solution.transport_cost)
    assert plan.sum().item() == pytest.approx(1, abs=1e-4)
    assert solution.converged == (solution.marginal_error <= 1e-4)
    assert (plan.sum(0) - problem.b).abs().sum() < 1e-5


@pytest.mark.parametrize("limit", [1, 2, 7])
@pytest.mark.parametrize("reg", [1e-4, 1e-8, "auto"])
def test_sinkhorn_is_finite_wherever_it_has_to_stop(limit, reg):
    cost = torch.exp(4 * torch.randn(40, 30, generator=generator(8)))
    solution = SOLVERS["sinkhorn"].solve(OTProblem.uniform(cost), SolverOptions(reg=reg, max_iterations=limit))
    assert torch.isfinite(solution.coupling.matrix).all()
    assert solution.converged == (solution.marginal_error <= 1e-4)
    assert torch.isfinite(solution.coupling.transport_map().to_rows(torch.ones(40, 2))).all()


def test_sinkhorn_says_when_the_limit_was_too_low():
    g = generator(4)
    cost = cost_matrix(torch.randn(80, 3, generator=g), torch.randn(80, 3, generator=g))
    solution = SOLVERS["sinkhorn"].solve(OTProblem.uniform(cost), SolverOptions(reg=1e-3, max_iterations=5))
    assert not solution.converged
    assert solution.marginal_error > 1e-4
    assert solution.iterations <= 20
    assert torch.isfinite(solution.coupling.matrix).all()


@pytest.mark.parametrize("target", [1.2, 2.0, 5.0])
@pytest.mark.parametrize("n", [50, 400])
def test_reg_auto_meets_its_target(target, n):
    g = generator(5)
    x, y = torch.randn(n, 64, generator=g), torch.randn(n, 64, generator=g)
    for scale in (1e-3, 1.0, 1e3):  # of the cost: reg has its unit
        problem = OTProblem.uniform(scale * cost_matrix(x, y))
        solution = SOLVERS["sinkhorn"].solve(problem, SolverOptions(target_support=target))
        assert solution.converged
        assert solution.effective_support == pytest.approx(target, rel=0.13)


def test_reg_auto_ends_where_no_reg_meets_the_target():
    alike = SOLVERS["sinkhorn"].solve(OTProblem.uniform(torch.zeros(10, 10)))
    assert alike.effective_support == pytest.approx(10, rel=1e-3)
    small = OTProblem.uniform(torch.rand(3, 3, generator=generator(6)))
    few = SOLVERS["sinkhorn"].solve(small, SolverOptions(target_support=9.0))
    assert few.converged and few.effective_support <= 3 + 1e-3


@pytest.mark.parametrize("reg", [0.0, -1.0, math.nan, math.inf, "much"])
def test_sinkhorn_refuses_a_reg_that_is_none(reg):
    with pytest.raises(SolverError, match="reg must be positive"):
        SOLVERS["sinkhorn"].solve(OTProblem.uniform(torch.rand(3, 3)), SolverOptions(reg=reg))


def test_scalings_beyond_the_range_of_float32_are_absorbed():
    """Without annealing: from a dual of zeros, columns that differ by some hundred reg need scalings of e^300."""
    from deus_merge.ot.solvers._semidual import Kernel
    from deus_merge.ot.solvers._steps import solve_level

    cost = torch.rand(40, 30, generator=generator(10)) + torch.linspace(0, 3, 30)
    kernel = Kernel(OTProblem.uniform(cost), SolverOptions())
    state = solve_level(kernel, torch.zeros(30), 0.01, 1e-4)
    assert state.error <= 1e-4 and state.longest <= 60
    plan = kernel.plan(state).matrix
    assert torch.isfinite(plan).all() and (plan.sum(0) - 1 / 30).abs().sum() < 1e-5


@pytest.mark.parametrize("name", ["sinkhorn", "unbalanced", "progot"])
@pytest.mark.parametrize("limit", [10_000, 41, 23])
def test_steps_ahead_of_a_read_change_nothing(name, limit, monkeypatch):
    """As an accelerator does them: the same plan and the same count of passes, also where the passes run out."""
    from deus_merge.ot.solvers import _steps

    assert (
        _steps.steps_ahead("cpu", 1) == _steps.steps_ahead("cuda", 1 << 30) == 1 < _steps.steps_ahead("cuda", 1 << 20)
    )
    g = generator(9)
    x, y = torch.randn(70, 5, generator=g), torch.randn(60, 5, generator=g)
    options = SolverOptions(reg=0.01, max_iterations=limit)
    found = []
    for ahead in (1, 4, 7):
        monkeypatch.setattr(_steps, "steps_ahead", lambda device, entries, ahead=ahead: ahead)
        found.append(SOLVERS[name].solve(OTProblem.uniform(PointCost(x, y, cost_scale="max")), options))
    for other in found[1:]:
        assert torch.equal(other.coupling.matrix, found[0].coupling.matrix)
        assert (other.iterations, other.converged) == (found[0].iterations, found[0].converged)


def test_solvers_describe_themselves_without_their_libraries():
    code = (
        "import sys; from deus_merge.ot.registry import solvers; found = solvers();"
        "assert all(s.name == n and s.summary and s.reference for n, s in found.items());"
        "assert not {'torch', 'scipy', 'ot', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
