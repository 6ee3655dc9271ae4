"""Exact assignment of many rows beside SciPy's dense solver, with the pruned way forced on small problems."""

from __future__ import annotations

import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from deus_merge.ot.costs import PointCost
from deus_merge.ot.problem import OTProblem, SolverOptions
from deus_merge.ot.solvers import assignment
from deus_merge.ot.solvers.assignment import SOLVER


def best(cost: torch.Tensor) -> float:
    rows, columns = linear_sum_assignment(cost.double().numpy())
    return cost.double()[torch.from_numpy(rows), torch.from_numpy(columns)].sum().item() / len(cost)


@settings(deadline=None, max_examples=60)
@given(
    n=st.integers(2, 120),
    kind=st.sampled_from(["uniform", "heavy", "whole numbers", "points", "planted", "twins", "negative", "constant"]),
    double=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_pruned_is_as_good_as_dense(n, kind, double, seed):
    g = torch.Generator().manual_seed(seed)
    cost = torch.rand(n, n, generator=g, dtype=torch.float64 if double else torch.float32)
    if kind == "heavy":
        cost = torch.exp(6 * cost)
    elif kind == "whole numbers":
        cost = (5 * cost).floor()
    elif kind in ("points", "planted"):
        x = torch.randn(n, 6, generator=g)
        noise = torch.randn(n, 6, generator=g)
        cost = torch.cdist(x, noise if kind == "points" else x[torch.randperm(n, generator=g)] + 0.1 * noise)
    elif kind == "twins":
        cost = cost[torch.randint(n, (n,), generator=g)][:, torch.randint(n, (n,), generator=g)]
    elif kind == "negative":
        cost = cost - 10
    elif kind == "constant":
        cost = torch.full_like(cost, 3.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(assignment, "_DENSE", 1)
        problem = OTProblem.uniform(cost.contiguous())
        solution = SOLVER.solve(problem)
        again = SOLVER.solve(problem)
    want = best(cost)
    assert sorted(solution.coupling.rows.tolist()) == list(range(n))
    assert solution.transport_cost == pytest.approx(want, rel=1e-9, abs=1e-9 * cost.abs().max().item())
    assert solution.gap is None or 0 <= solution.gap <= 1e-6
    assert torch.equal(solution.coupling.rows, again.coupling.rows)


def test_a_memory_limit_changes_nothing(monkeypatch):
    monkeypatch.setattr(assignment, "_DENSE", 1)
    monkeypatch.setattr("deus_merge.ot.blocks.PRODUCT_ELEMENTS", 30_000)
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(400, 20, generator=g), torch.randn(400, 20, generator=g)
    plans = [SOLVER.solve(OTProblem.uniform(PointCost(x, y)), SolverOptions(memory=m)) for m in (None, 0)]
    assert torch.equal(plans[0].coupling.rows, plans[1].coupling.rows)
    assert plans[0].gap <= 1e-6


def test_ties_take_no_exponential_time():
    """Half of the neurons on each side are dead: rows of zeros, all alike."""
    g = torch.Generator().manual_seed(3)
    x, y = (torch.randn(1100, 16, generator=g) * (torch.rand(1100, 1, generator=g) < 0.5) for _ in range(2))
    began = time.process_time()
    solution = SOLVER.solve(OTProblem.uniform(PointCost(x, y)))
    assert time.process_time() - began < 30  # about 1 s; by SciPy's bipartite matching, minutes
    assert solution.gap is not None and solution.gap <= 1e-9
    distances = torch.cdist(x.double(), y.double(), compute_mode="donot_use_mm_for_euclid_dist")
    assert solution.transport_cost == pytest.approx(best(distances), rel=1e-6)


@pytest.mark.slow
def test_two_thousand_rows():
    cost = torch.rand(2000, 2000, generator=torch.Generator().manual_seed(1))
    solution = SOLVER.solve(OTProblem.uniform(cost))
    assert solution.transport_cost == pytest.approx(best(cost), rel=1e-9)
    assert solution.gap is not None and solution.gap <= 1e-6
