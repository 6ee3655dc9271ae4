"""Points whose rows are made on demand, and costs on the disk: the same numbers as in memory, bit for bit."""

from __future__ import annotations

import os

import pytest
import torch

from deus_merge.core import on_disk
from deus_merge.core.errors import SolverError
from deus_merge.ot import costs
from deus_merge.ot.costs import COSTS, PointCost, unit_points
from deus_merge.ot.lower_bounds import LowerBounds
from deus_merge.ot.points import LazyPoints, dense
from deus_merge.ot.problem import OTProblem, SolverOptions
from deus_merge.ot.solvers import assignment


class Made(LazyPoints):
    """Rows that are copied out of a matrix, and counted."""

    def __init__(self, matrix: torch.Tensor):
        self.shape, self.dtype, self.device = tuple(matrix.shape), matrix.dtype, matrix.device
        self.matrix, self.made = matrix, 0

    def __getitem__(self, which):
        rows = self.matrix[which].clone()
        self.made += len(rows)
        return rows


@pytest.fixture
def blocks(monkeypatch):
    """Several blocks, panels and parts of each, none of which divides the others."""
    monkeypatch.setattr("deus_merge.ot.blocks.PRODUCT_ELEMENTS", 3000)
    monkeypatch.setattr("deus_merge.ot.blocks.BLOCK_ELEMENTS", 800)
    for module in ("points", "products"):
        monkeypatch.setattr(f"deus_merge.ot.{module}.PANEL_ROWS", 64)
    monkeypatch.setattr("deus_merge.ot.products._TERMS", 16)


def pair(n: int = 150, d: int = 40, offset: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(5)
    x = torch.randn(n, d, generator=g)
    y = 0.7 * x[torch.randperm(n, generator=g)] + torch.randn(n, d, generator=g)
    y[3], y[4] = x[7], 0  # a twin, and a row without a direction
    return x + offset, y + offset


@pytest.mark.parametrize("offset", [0.0, 20.0])
@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("low", [None, torch.float32, torch.bfloat16, torch.int8])
def test_lazy_points_have_the_cost_of_those_in_memory(blocks, cost, offset, low):
    x, y = pair(offset=offset)
    made = Made(x), Made(y)
    found = []
    for one, other in ((x, y), made):
        entries = PointCost(one, other, cost=cost, cost_scale="max")
        if low is not None:
            entries = LowerBounds(entries, low)
        entries.keep(0)
        r, s = torch.arange(150), torch.arange(150).flip(0)
        found.append([entries.scale, entries.dense(), entries.at(r, s)])
    assert found[0][0] == found[1][0]
    assert torch.equal(found[0][1], found[1][1]) and torch.equal(found[0][2], found[1][2])
    assert made[0].made > 150


def test_lazy_points_may_be_scaled_and_the_matrix_stays(blocks):
    x, _ = pair()
    before, scaled = x.clone(), unit_points(Made(x))
    for _ in range(2):
        assert torch.equal(dense(scaled), unit_points(x))
        assert torch.equal(scaled[torch.tensor([5, 5, 2])], unit_points(x)[[5, 5, 2]])
    assert torch.equal(x, before)


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("kind", ["NaN", "too large", "too large for float64"])
def test_values_that_no_cost_has_are_refused(blocks, kind, side):
    x, y = pair()
    if kind == "too large for float64":
        x, y = x.double(), y.double()
    (x, y)[side][17, 3] = {"NaN": float("nan"), "too large": 1e30}.get(kind, 1e200)
    said = "the cost is not finite" if kind == "NaN" else r"overflows float\d\d\n.*\n.*1e\+\d\d"
    with pytest.raises(SolverError, match=said):
        PointCost(Made(x), Made(y))


def test_a_matching_is_that_of_points_in_memory(blocks, monkeypatch):
    monkeypatch.setattr(assignment, "_DENSE", 1)
    x, y = pair(300)
    plans = [
        assignment.SOLVER.solve(OTProblem.uniform(PointCost(*sides, cost_scale="max")), SolverOptions(memory=memory))
        for sides, memory in (((x, y), None), ((Made(x), Made(y)), 0))
    ]
    assert torch.equal(plans[0].coupling.rows, plans[1].coupling.rows)
    for field in ("transport_cost", "gap", "iterations"):
        assert getattr(plans[0], field) == getattr(plans[1], field)


@pytest.mark.parametrize("room", [True, False])
def test_what_does_not_fit_is_computed_once_where_the_disk_has_room(blocks, monkeypatch, tmp_path, room):
    monkeypatch.setattr(costs, "_LARGE", 1)
    monkeypatch.setenv("TMPDIR", str(tmp_path if room else tmp_path / "missing"))
    x, y = pair()
    want, computed = PointCost(x, y).dense(), []
    compute = PointCost._compute
    monkeypatch.setattr(PointCost, "_compute", lambda *a: (computed.append(a[1].start), compute(*a))[1])
    cost = PointCost(x, y)
    cost.keep(want.nbytes // 3, disk=True)
    for _ in range(3):
        assert torch.equal(torch.cat([rows.clone() for _, rows in cost.blocks()]), want)
    blocks_of = len(set(computed))
    assert blocks_of > 6
    assert len(computed) == blocks_of if room else len(computed) > 2 * blocks_of
    assert not list(tmp_path.iterdir())  # the files have no names


def test_a_disk_is_never_filled(monkeypatch, tmp_path):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    free = os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize
    assert on_disk.matrix_on_disk(free // 4, 4, torch.float32) is None
    assert on_disk.matrix_on_disk(16, 4, torch.float32).shape == (16, 4)
