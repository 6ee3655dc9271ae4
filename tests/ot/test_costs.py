"""Costs against float64 differences, also where the Gram matrix has lost its digits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deus_merge.core.errors import SolverError
from deus_merge.ot.costs import COSTS, PointCost, cost_matrix, unit_rows


def exact(name: str, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    x, y = x.double(), y.double()
    if name == "cosine":
        return 0.5 * (unit_rows(x)[:, None] - unit_rows(y)[None]).square().sum(2)
    squared = (x[:, None] - y[None]).square().sum(2)
    return squared if name == "sqeuclidean" else squared.sqrt()


@settings(deadline=None, max_examples=60)
@given(
    name=st.sampled_from(sorted(COSTS)),
    n=st.integers(1, 30),
    m=st.integers(1, 30),
    d=st.integers(1, 40),
    offset=st.sampled_from([0.0, 100.0]),
    noise=st.sampled_from([0.0, 1e-4, 1e-2]),
    seed=st.integers(0, 2**16),
)
def test_costs_are_exact_also_between_near_twins(name, n, m, d, offset, noise, seed):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=g) + offset
    y = x[torch.randint(n, (m,), generator=g)] + noise * torch.randn(m, d, generator=g)
    cost, want = cost_matrix(x, y, cost=name), exact(name, x, y)
    spread = want.max() + (offset * 2e-7) ** (1 if name == "euclidean" else 2) + 1e-12
    # Unit rows are rounded to float32 before they are compared: cosine is that much off a distance of sqrt(2 want).
    rounding = 4e-7 * (want.max().item() ** 0.5) if name == "cosine" else 0.0
    assert (cost.double() - want).abs().max() <= 1e-4 * spread + rounding
    near = want < 1e-3 * want.max()
    # The offset's own rounding in float32 is part of the inputs, so a relative error is fair without it.
    if offset == 0 and name != "cosine" and near.any():
        assert ((cost - want).abs()[near] <= 1e-3 * want[near] + 1e-12).all()


def test_a_planted_permutation_costs_nothing():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(300, 64, generator=g) * torch.logspace(-3, 3, 300).unsqueeze(1)
    order = torch.randperm(300, generator=g)
    cost = cost_matrix(x, x[order])
    assert (cost[order, torch.arange(300)] == 0).all()
    assert (cost == 0).sum() == 300


def test_equal_rows_and_zero_rows_are_no_trouble():
    x = torch.zeros(50, 7)
    x[:30] = torch.arange(7.0)
    for name in COSTS:
        cost = cost_matrix(x, x, cost=name)
        assert torch.isfinite(cost).all()
        assert cost[:30, :30].abs().max() < 1e-6 and cost[30:, 30:].abs().max() < 1e-6
    assert (cost_matrix(x * 0, x * 0, unit=True, cost_scale="max") == 0).all()


def test_scales_and_refusals():
    x, y = torch.randn(9, 4), torch.randn(7, 4)
    assert cost_matrix(x, y, cost_scale="max").max() == 1
    assert cost_matrix(x, y, cost_scale="median").median() == 1
    assert torch.allclose(cost_matrix(5 * x, y, unit=True), cost_matrix(x, 3 * y, unit=True), atol=1e-6)
    with pytest.raises(SolverError, match="unknown cost\n.*\n.*\n.*did you mean 'euclidean'"):
        cost_matrix(x, y, cost="euclidian")
    with pytest.raises(SolverError, match="unknown cost_scale"):
        cost_matrix(x, y, cost_scale="mean")
    with pytest.raises(SolverError, match="different length"):
        cost_matrix(x, y[:, :3])
    with pytest.raises(SolverError, match="float32 or float64"):
        cost_matrix(x.half(), y.half())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("cost_scale", ["none", "max", "median"])
def test_row_blocks_are_the_matrix_whatever_is_kept(dtype, cost_scale, monkeypatch):
    monkeypatch.setattr("deus_merge.ot.blocks.PRODUCT_ELEMENTS", 3000)  # several blocks without a large matrix
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(97, 5, generator=g, dtype=dtype), torch.randn(110, 5, generator=g, dtype=dtype)
    want = cost_matrix(x, y, cost_scale=cost_scale)
    if cost_scale != "none":
        plain = cost_matrix(x, y)
        assert torch.equal(want, plain / (plain.max() if cost_scale == "max" else plain.median()))
    for keep in (None, 0, want.nbytes // 3):
        lazy = PointCost(x, y, cost_scale=cost_scale)
        lazy.keep(keep)
        for _ in range(3):
            assert torch.equal(torch.cat([rows.clone() for _, rows in lazy.blocks()]), want)


def test_near_twins_are_exact_on_every_pass(monkeypatch):
    monkeypatch.setattr("deus_merge.ot.blocks.PRODUCT_ELEMENTS", 3000)
    g = torch.Generator().manual_seed(3)
    x = torch.randn(97, 5, generator=g)
    cost = PointCost(x, x[torch.randperm(97, generator=g)])
    cost.keep(0)
    for _ in range(3):
        assert sum((rows == 0).sum().item() for _, rows in cost.blocks()) == 97


def test_points_go_when_nobody_needs_them():
    x, y = torch.randn(6, 3), torch.randn(5, 3)
    kept, gone = PointCost(x, y), PointCost(x, y, keep_points=False)
    for cost in (kept, gone):
        assert len(list(cost.blocks())) == 1
    assert torch.allclose(torch.cdist(*kept.points), torch.cdist(x, y), atol=1e-5)
    with pytest.raises(SolverError, match="points of this cost are gone"):
        gone.points  # noqa: B018


def test_costs_that_overflow_say_so():
    x = torch.full((3, 4), 1e19)
    with pytest.raises(SolverError, match="overflows float32\n.*\n.*1e\\+19\n.*unit_rows"):
        cost_matrix(x, -x)
    assert torch.isfinite(cost_matrix(x.double(), -x.double())).all()
