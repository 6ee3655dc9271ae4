"""Bounds of costs in a fast precision: never above the costs, and the matching found through them is the exact one."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from deus_merge.ot import products
from deus_merge.ot.costs import COSTS, PointCost
from deus_merge.ot.lower_bounds import LowerBounds
from deus_merge.ot.problem import OTProblem
from deus_merge.ot.solvers import assignment
from deus_merge.ot.solvers.assignment import SOLVER

KINDS = ("random", "planted", "twins", "sizes", "few", "offset", "opposite", "tiny", "outliers", "equal", "dead")
PRECISIONS = (torch.int8, torch.bfloat16, torch.float32)


def rows(kind: str, n: int, d: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    x, y = torch.randn(n, d, generator=g), torch.randn(n, d, generator=g)
    if kind == "planted":
        y = x[torch.randperm(n, generator=g)] + 0.05 * y
    elif kind == "twins":
        y = x[torch.randint(n, (n,), generator=g)]
    elif kind == "sizes":
        x, y = (z * torch.exp(3 * torch.randn(n, 1, generator=g)) for z in (x, y))
    elif kind == "few":
        x, y = (z.where(torch.rand(n, d, generator=g) < 0.1, 0) for z in (x, y))
    elif kind == "offset":
        x, y = x + 50, y + 50
    elif kind == "opposite":  # many entries near the largest
        x = x / x.norm(dim=1, keepdim=True)
        y = -x + 1e-3 * y
    elif kind == "tiny":
        x, y = x * 1e-17, y * 1e-17
    elif kind == "outliers":  # steps of 8 bits are large
        x[::3, ::9] *= 100
        y[:, 0] *= 100
    elif kind == "equal":
        y = x
    elif kind == "dead":
        x, y = (z * (torch.rand(n, 1, generator=g) < 0.7) for z in (x, y))
    return x, y


def exact(x: torch.Tensor, y: torch.Tensor, cost: str) -> torch.Tensor:
    x, y = x.double(), y.double()
    if cost == "cosine":
        x, y = (z / z.norm(dim=1, keepdim=True).clamp_min(1e-300) for z in (x, y))
    away = (x.unsqueeze(1) - y).square().sum(2)
    return {"euclidean": away.sqrt(), "sqeuclidean": away, "cosine": away / 2}[cost]


@settings(deadline=None, max_examples=60)
@given(
    n=st.integers(1, 60),
    d=st.integers(1, 70),
    kind=st.sampled_from(KINDS),
    cost=st.sampled_from(COSTS),
    scale=st.sampled_from(["none", "max", "median"]),
    precision=st.sampled_from(PRECISIONS),
    seed=st.integers(0, 2**16),
)
def test_bounds_are_below_the_cost_and_close(n, d, kind, cost, scale, precision, seed):
    assume(precision != torch.int8 or d > 1)  # see exact_integers
    x, y = rows(kind, n, d, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(products, "_TERMS", 32)
        bounds = LowerBounds(PointCost(x, y, cost=cost, cost_scale=scale), precision)
    want = exact(x, y, cost)
    if scale == "max":
        assert bounds.scale == pytest.approx(want.max().item() or 1.0, rel=1e-6)
    want = want / bounds.scale
    r, s = torch.arange(n).repeat_interleave(n), torch.arange(n).repeat(n)
    found, entries = bounds.dense().double(), bounds.at(r, s).view(n, n)
    size = x.double().norm(dim=1, keepdim=True) + y.double().norm(dim=1)  # (n, n)
    assert torch.allclose(entries, want, rtol=2e-6, atol=1e-6 * (1 if cost == "cosine" else size.max().item()))
    rounding = 1e-6 * (entries + entries.max())
    assert (found <= entries + rounding).all()
    if cost == "sqeuclidean":
        one, other = (points.double().norm(dim=1) for points in bounds._centred)
        compared = one.unsqueeze(1) + other  # (n, n)
        # The largest element of a row, of which a step is a part, can be the row's norm.
        most = {torch.int8: 0.1 + 0.2 * d**-0.5, torch.bfloat16: 0.03, torch.float32: 1e-4}[precision]
        assert ((entries - found) * bounds.scale <= most * compared.square() + 1e-30).all()


def use(monkeypatch, precision: torch.dtype | None) -> None:
    """Read bounds in this precision, tight or not; None: in the cost's own."""
    made = (lambda cost: LowerBounds(cost, precision)) if precision else lambda cost: None
    monkeypatch.setattr(assignment, "fast_bounds", made)


@pytest.mark.parametrize("kind", KINDS)
def test_the_matching_does_not_depend_on_the_precision(monkeypatch, kind):
    monkeypatch.setattr(assignment, "_DENSE", 1)
    x, y = rows(kind, 300, 40, 3)
    plans = {}
    for precision in (torch.int8, torch.bfloat16, None):
        use(monkeypatch, precision)
        plans[precision] = SOLVER.solve(OTProblem.uniform(PointCost(x, y, cost_scale="max")))
    found = exact(x, y, "euclidean")
    best = found[linear_sum_assignment(found.numpy())].mean().item() / found.max().item()
    for plan in plans.values():
        assert plan.transport_cost == pytest.approx(best, rel=1e-6, abs=1e-9)
        assert plan.gap is not None and plan.gap <= 1e-6
    if kind not in ("twins", "dead"):  # equal rows may change places
        for precision in (torch.int8, torch.bfloat16):
            assert torch.equal(plans[precision].coupling.rows, plans[None].coupling.rows)


@pytest.mark.parametrize("precision", [torch.int8, torch.bfloat16])
def test_few_rounds_and_few_exact_costs(monkeypatch, precision):
    """Weak matches among many features: a round that added only the edges priced below 0 would be one of dozens."""
    monkeypatch.setattr(assignment, "_ROUNDS", 4)
    use(monkeypatch, precision)
    g = torch.Generator().manual_seed(0)
    x = torch.randn(1500, 1024, generator=g)
    y = torch.randn(1500, 1024, generator=g) + 5 * x[torch.randperm(1500, generator=g)] / 50
    computed = []
    between = PointCost._between

    def counted(self, r, s):
        computed.append(len(r))
        return between(self, r, s)

    monkeypatch.setattr(PointCost, "_between", counted)
    solution = SOLVER.solve(OTProblem.uniform(PointCost(x, y, cost_scale="max")))
    assert solution.gap is not None and solution.gap <= 1e-9
    assert 2 * 1500 < sum(computed) < 20 * 1500


def test_the_largest_cost_is_found_among_few(monkeypatch):
    computed, between = [], PointCost._between
    monkeypatch.setattr(PointCost, "_between", lambda self, r, s: (computed.append(len(r)), between(self, r, s))[1])
    g = torch.Generator().manual_seed(2)
    x, y = (torch.nn.functional.normalize(torch.randn(1500, 4500, generator=g)) for _ in range(2))
    bounds = LowerBounds(PointCost(x, y, cost_scale="max"), torch.bfloat16)
    assert bounds.scale == pytest.approx(torch.cdist(x.double(), y.double()).max().item(), rel=1e-9)
    assert sum(computed) < 1500  # of more than two million


@pytest.mark.parametrize("alive", [0.5, 0.95])
def test_dead_rows_are_settled_by_bounds(monkeypatch, alive):
    """Rows of zeros are all alike, and the nearest of all others: no better bounds help."""
    use(monkeypatch, torch.int8)
    read, make = [], LowerBounds.__init__
    monkeypatch.setattr(LowerBounds, "__init__", lambda *a: (read.append(a[2]), make(*a))[1])
    g = torch.Generator().manual_seed(3)
    x, y = (torch.randn(1500, 400, generator=g) * (torch.rand(1500, 1, generator=g) < alive) for _ in range(2))
    solution = SOLVER.solve(OTProblem.uniform(PointCost(x, y)))
    assert read == [torch.int8]
    assert solution.gap is not None and solution.gap <= 1e-9


@pytest.mark.parametrize("precision", [torch.int8, torch.bfloat16])
def test_points_in_doubt_get_better_bounds(monkeypatch, precision):
    """Rows so alike that bounds in bfloat16 leave all edges open; then the cost itself is read."""
    monkeypatch.setattr(assignment, "_DENSE", 1)
    use(monkeypatch, precision)
    read = []
    make = LowerBounds.__init__
    monkeypatch.setattr(LowerBounds, "__init__", lambda *a: (read.append(a[2]), make(*a))[1])
    g = torch.Generator().manual_seed(1)
    centres = torch.randn(2, 30, generator=g)
    x, y = (centres.repeat(150, 1) + 0.2 * torch.randn(300, 30, generator=g) for _ in range(2))
    solution = SOLVER.solve(OTProblem.uniform(PointCost(x, y)))
    found = exact(x, y, "euclidean")
    assert solution.transport_cost == pytest.approx(found[linear_sum_assignment(found.numpy())].mean().item(), rel=1e-6)
    assert read[0] == precision


def test_which_processors_are_fast(monkeypatch):
    x = torch.randn(8, 2)
    monkeypatch.setattr(products, "exact_integers", lambda width: True)
    for features, want in (
        ({"amx_bf16": True, "amx_int8": True}, [torch.int8, torch.bfloat16]),
        ({"avx512_bf16": True, "avx512_vnni": True}, [torch.int8, torch.bfloat16]),
        ({"avx512_vnni": True}, [torch.int8]),
        ({"avx512_bf16": True}, [torch.bfloat16]),
        ({}, []),
    ):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda features=features: features, raising=False)
        assert products.fast_precisions(x) == want
        assert products.fast_precisions(x.double()) == []
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert products.fast_precisions(x) == []


@pytest.mark.parametrize("seed", [0, 1, 42, products._SEED])
def test_weights_that_are_drawn_with_a_common_seed(seed):
    """Were the dither drawn with their seed, rows of one value would meet errors that are all alike."""
    y = torch.rand(1, 4096, generator=torch.Generator().manual_seed(seed)) - 0.5
    y = torch.cat((y, -y))
    bounds = LowerBounds(PointCost(torch.full((4, 4096), 0.5), y, cost="sqeuclidean"), torch.int8)
    want = exact(torch.full((4, 4096), 0.5), y, "sqeuclidean")
    assert bool((bounds.dense().double() <= want + 1e-6 * want.max()).all()) == (seed != products._SEED)


def test_many_rows_nearly_alike_in_two_clusters():
    g = torch.Generator().manual_seed(0)
    centre, signs = torch.randn(32, generator=g), torch.ones(400, 1)
    signs[::2] = -1
    x, y = (torch.cat([signs * centre, 1e-10 * torch.randn(400, 32, generator=g)], 1) for _ in range(2))
    bounds = LowerBounds(PointCost(x, y), torch.float32)
    assert (bounds.dense().double() <= exact(x, y, "euclidean") * (1 + 1e-6)).all()


def test_rows_too_short_for_bfloat16():
    x, y = rows("random", 50, 900, 0)
    assert LowerBounds(PointCost(x, y), torch.bfloat16).tight
    assert not LowerBounds(PointCost(1e-18 * x, 1e-18 * y), torch.bfloat16).tight


@pytest.mark.parametrize("precision", [torch.int8, torch.float32])
def test_long_rows_beside_dead_ones(precision):
    """Nothing but the norms decides these costs: added up in float32 they are off by 5e-5."""
    x = torch.ones(8, 1 << 17)
    x[:, ::3] = 1.0001
    x *= torch.randn(8, 1 << 17, generator=torch.Generator().manual_seed(0)).sign()
    y = -x.roll(1)
    y[0] = 0
    bounds = LowerBounds(PointCost(x, y), precision)
    assert torch.allclose(bounds.dense()[:, 0].double(), x.double().norm(dim=1), rtol=4e-7)


@pytest.mark.parametrize("isa", ["AVX2", ""])
def test_integers_that_saturate_are_not_used(isa):
    """Older processors' instructions, in a process of their own: products are refused, or they are exact."""
    code = """
import torch
from deus_merge.ot.products import exact_integers
g = torch.Generator().manual_seed(0)
x, y = (torch.randint(-126, 128, (70, 900), generator=g, dtype=torch.int8) for _ in range(2))
exact = bool((torch.ops.aten._int_mm(x, y.t()).double() == x.double() @ y.double().t()).all())
narrow = all(exact_integers(width) for width in (2, 3, 4, 5))
print(exact_integers(900), exact, exact_integers(1 << 18), narrow)
"""
    environment = os.environ | ({"ONEDNN_MAX_CPU_ISA": isa} if isa else {})
    ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    used, exact, too_wide, narrow = ran.stdout.split()
    assert used in (exact, "False") and too_wide == "False" and narrow in (exact, "False")


@pytest.mark.parametrize("equal", [False, True])
def test_dithered_products_are_as_exact_as_is_proved(monkeypatch, equal):
    """The bound is reached nearly, where it may fail as often as not; and no product is off in one direction."""
    monkeypatch.setattr(products, "_FAILURE", 0.5)
    monkeypatch.setattr(products, "PANEL_ROWS", 200)
    g = torch.Generator().manual_seed(7)
    x = torch.randn(600, 2048, generator=g) * torch.rand(600, 1, generator=g)
    y = x if equal else torch.randn(500, 2048, generator=g)
    made = products.products(x, y, torch.int8)
    upper = torch.full((600, len(y)), torch.nan)
    for block in made.blocks():
        made.upper(block, upper[block])
    error = (made.left @ made.right).double()
    off = upper.double() - error - x.double() @ y.double().t()
    assert 0.7 < (off.abs() / error).max() <= 1
    relative = off / (x.norm(dim=1, keepdim=True) * y.norm(dim=1))
    assert made.error == pytest.approx((error / (x.norm(dim=1, keepdim=True) * y.norm(dim=1))).mean().item(), rel=0.1)
    assert abs(relative.mean()) < made.error / 20
    if equal:
        assert abs(relative.diagonal().mean()) < made.error / 40
