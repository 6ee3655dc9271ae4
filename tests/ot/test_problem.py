"""The types: what they refuse, and that a coupling and a transport map cannot stand in for each other."""

from __future__ import annotations

import pytest
import torch

from deus_merge.core.errors import SolverError
from deus_merge.ot.coupling import Coupling, ScriptedMap
from deus_merge.ot.problem import OTProblem


@pytest.mark.parametrize(
    ("cost", "a", "b", "message"),
    [
        (torch.zeros(3), None, None, "not a matrix"),
        (torch.zeros(0, 3), None, None, "not a matrix"),
        (torch.zeros(2, 2, dtype=torch.int64), None, None, "dtype"),
        (torch.tensor([[0.0, float("nan")], [1.0, 2.0]]), None, None, "not finite"),
        (torch.tensor([[0.0, float("inf")], [1.0, 2.0]]), None, None, "not finite"),
        (torch.zeros(2, 2), torch.tensor([1.5, -0.5]), None, "marginal a"),
        (torch.zeros(2, 2), None, torch.tensor([0.5, 0.6]), "marginal b"),
        (torch.zeros(2, 3), torch.full((3,), 1 / 3), None, "marginal a"),
    ],
)
def test_problems_without_meaning_are_refused(cost, a, b, message):
    with pytest.raises(SolverError, match=message):
        if a is None and b is None:
            OTProblem.uniform(cost)
        else:
            n, m = cost.shape
            OTProblem(
                cost,
                torch.full((n,), 1 / n) if a is None else a,
                torch.full((m,), 1 / m) if b is None else b,
            )


def test_a_map_takes_weighted_means_and_a_coupling_is_n_times_smaller():
    n, m, d = 5, 4, 3
    g = torch.Generator().manual_seed(0)
    plan = torch.rand(n, m, generator=g, dtype=torch.float64)
    plan /= plan.sum(0) * m  # columns 1/m
    coupling, weight = Coupling(plan), torch.randn(n, d, generator=g, dtype=torch.float64)
    moved, scripted = coupling.transport_map(), ScriptedMap(coupling)

    assert torch.allclose(moved.matrix.sum(0), torch.ones(m, dtype=torch.float64))
    assert torch.allclose(moved.to_rows(weight), m * coupling.scripted_rows(weight))
    assert torch.allclose(moved.to_columns(weight.t()), m * coupling.scripted_columns(weight.t()))
    assert torch.equal(scripted.to_rows(weight), coupling.scripted_rows(weight))
    assert torch.equal(scripted.to_columns(weight.t()), coupling.scripted_columns(weight.t()))
    assert moved.to_rows(weight).max() <= weight.max()
    assert not hasattr(coupling, "to_rows")
    assert not hasattr(moved, "scripted_rows")
    for either in (moved, scripted):
        with pytest.raises(SolverError, match="does not fit"):
            either.to_rows(weight[:-1])
        with pytest.raises(SolverError, match="does not fit"):
            either.to_columns(weight)


@pytest.mark.parametrize("support", [1, 3, 8])
def test_effective_support_counts_rows(support):
    plan = torch.zeros(8, 5)
    plan[:support] = 1 / (5 * support)
    assert Coupling(plan).effective_support() == pytest.approx(support, rel=1e-5)


def test_effective_support_leaves_empty_columns_out():
    plan = torch.zeros(8, 5)
    plan[:3, 1:] = 1 / 12
    assert Coupling(plan).effective_support() == pytest.approx(3, rel=1e-5)
    measures = Coupling(plan).measures(OTProblem(torch.ones(8, 5), plan.sum(1), plan.sum(0)))
    assert measures == pytest.approx((0, 1, 3), rel=1e-5, abs=1e-6)
    assert Coupling(torch.zeros(2, 2)).effective_support() == 0
