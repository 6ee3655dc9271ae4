"""transport_flow against a float64 evaluation of the algorithm's text, planted symmetries, and its laws."""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pytest
import torch

from deus_merge.align import fuse_layer
from deus_merge.align.options import AlignOptions
from deus_merge.core.errors import SolverError
from deus_merge.models.spec import TensorSpec
from deus_merge.ot.problem import SolverOptions
from deus_merge.ot.registry import solver as solver_named
from deus_merge.ot.registry import solvers

D, HEADS, GROUPS, H, F = 24, 4, 2, 6, 32  # hidden size, query and key-value heads, head size, neurons
SHAPES = {
    "n1": (D,), "q": (HEADS * H, D), "q.bias": (HEADS * H,), "q_norm": (H,), "k": (GROUPS * H, D),
    "k.bias": (GROUPS * H,), "k_norm": (H,), "v": (GROUPS * H, D), "v.bias": (GROUPS * H,), "o": (D, HEADS * H),
    "o.bias": (D,), "n2": (D,), "gate": (F, D), "gate.bias": (F,), "up": (F, D), "down": (D, F), "down.bias": (D,),
}  # fmt: skip
_SPACES = {
    "q": ("residual", "query_heads"), "k": ("residual", "key_heads"), "v": ("residual", "value_heads"),
    "o": ("value_heads", "residual"), "gate": ("residual", "neurons"), "up": ("residual", "neurons"),
    "down": ("neurons", "residual"),
}  # fmt: skip


def spec(role: str) -> TensorSpec:
    if role in _SPACES:
        return TensorSpec(role, role, *_SPACES[role])
    if role in ("n1", "n2"):
        return TensorSpec(role, role, None, "residual")
    followed = role.replace(".bias", "").replace("_norm", "")
    return TensorSpec(role, role, None, _SPACES[followed][1], follows=followed)


SPECS = tuple(spec(role) for role in SHAPES)
PLAIN = AlignOptions(zero=frozenset(), solver_options=SolverOptions(reg=0.06))


def change(options: AlignOptions, **changes) -> AlignOptions:
    """`replace`, also of what the solver gets."""
    inner = {f.name: changes.pop(f.name) for f in fields(SolverOptions) if f.name in changes}
    return replace(options, solver_options=replace(options.solver_options, **inner), **changes)


def layer(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    made = {role: 0.3 * torch.randn(*shape, generator=g) for role, shape in SHAPES.items()}
    for norm in ("n1", "n2", "q_norm", "k_norm"):
        made[norm] += 1
    return {role: tensor.to(dtype) for role, tensor in made.items()}


def fused(a, b, options) -> dict[str, torch.Tensor]:
    return {c.role: c.values for c in fuse_layer(a, b, SPECS, options) if c.values is not None}


def sinkhorn_float64(cost: np.ndarray, reg: float) -> np.ndarray:
    """The coupling of uniform marginals, by the textbook's log-domain iteration."""
    n, m = cost.shape
    f, g = np.zeros(n), np.zeros(m)
    for _ in range(3000):
        f = -reg * np.log(np.exp((g - cost) / reg - ((g - cost) / reg).max(1, keepdims=True)).sum(1) * n)
        f -= ((g - cost) / reg).max(1) * reg
        s = (f[:, None] - cost) / reg
        g = -reg * (np.log(np.exp(s - s.max(0)).sum(0) * m) + s.max(0))
    return np.exp((f[:, None] + g - cost) / reg)


def as_the_text_says(a, b, plan_scale: str, reg: float) -> dict[str, np.ndarray]:
    """Section 2 of the algorithm, step by step, in float64; nothing is zeroed."""
    a, b = ({role: tensor.double().numpy() for role, tensor in x.items()} for x in (a, b))
    out, plans = {}, {}

    def block(role: str, t_in: np.ndarray) -> np.ndarray:
        w_a = a[role] @ t_in
        cost = np.sqrt(((w_a[:, None, :] - b[role][None]) ** 2).sum(2))
        coupling = sinkhorn_float64(cost, reg)
        t_out = coupling * len(coupling) if plan_scale == "barycentric" else coupling
        out[role] = 0.5 * (t_out.T @ w_a + b[role])
        plans[role] = t_out
        return t_out

    eye = np.eye(D)
    out["n1"] = 0.5 * (a["n1"] + b["n1"])
    for role in ("q", "k", "v"):
        block(role, eye)
    t_o = block("o", np.eye(HEADS * H))
    out["n2"] = 0.5 * (a["n2"] @ (0.5 * t_o + 0.5 * eye) + b["n2"])
    block("gate", t_o)
    block("up", t_o)
    block("down", np.eye(F))
    for role in ("q", "k", "v", "o", "gate", "down"):
        if role + ".bias" in a:
            out[role + ".bias"] = 0.5 * (plans[role].T @ a[role + ".bias"] + b[role + ".bias"])
    for role, heads in (("q", HEADS), ("k", GROUPS)):  # the plan seen from one component of a head
        moved = plans[role].T @ np.tile(a[role + "_norm"], heads)
        out[role + "_norm"] = 0.5 * (moved.reshape(heads, H).mean(0) + b[role + "_norm"])
    return out


@pytest.mark.parametrize("plan_scale", ["barycentric", "coupling"])
@pytest.mark.parametrize("compute_dtype", ["float32", "float64"])
def test_the_algorithm_as_the_text_says(plan_scale, compute_dtype):
    a, b = layer(0), layer(1)
    options = change(PLAIN, plan_scale=plan_scale, compute_dtype=compute_dtype, tolerance=1e-6)
    got, want = fused(a, b, options), as_the_text_says(a, b, plan_scale, 0.06)
    assert set(got) == set(SHAPES)
    for role in want:
        assert got[role].dtype == getattr(torch, compute_dtype)
        assert np.abs(got[role].double().numpy() - want[role]).max() < 1e-4, role


def test_the_script_adds_almost_nothing_to_half_of_b():
    """What the coupling's scale means: rows of A come in divided by n."""
    a, b = layer(0), layer(1)
    got = fused(a, b, change(PLAIN, plan_scale="coupling"))
    for role in ("q", "k", "v", "o"):
        added = (got[role] - 0.5 * b[role]).norm(dim=1).max()
        assert added <= a[role].norm(dim=1).max() / (2 * len(a[role])) * (1 + 1e-4)


def planted(seed: int):
    """A, and a B made from A by permutations that the flow can find: aligned A is B in every role but n2."""
    g = torch.Generator().manual_seed(seed)
    a = layer(seed)

    def shuffle(n: int) -> torch.Tensor:
        return torch.randperm(n, generator=g)

    inner = shuffle(H)  # the same inside every head, so that per-head norms have an order at all
    rows = {
        "q": (shuffle(HEADS)[:, None] * H + inner).flatten(),
        "k": (shuffle(GROUPS)[:, None] * H + inner).flatten(),
        "v": shuffle(GROUPS * H), "o": shuffle(D), "gate": shuffle(F), "up": shuffle(F), "down": shuffle(D),
    }  # fmt: skip
    b = dict(a)
    for role, order in rows.items():
        b[role] = (a[role][:, rows["o"]] if role in ("gate", "up") else a[role])[order]
        if role + ".bias" in a:
            b[role + ".bias"] = a[role + ".bias"][order]
    b["q_norm"], b["k_norm"] = a["q_norm"][inner], a["k_norm"][inner]
    b["n2"] = a["n2"][rows["o"]]
    return a, b


@pytest.mark.parametrize("solver", solvers())
@pytest.mark.parametrize("restore_norm", ["none", "row", "tensor"])
def test_a_planted_permutation_of_a_whole_layer_is_recovered(solver, restore_norm):
    a, b = planted(7)
    options = change(PLAIN, solver=solver_named(solver), reg=0.01, restore_norm=restore_norm, tolerance=1e-6)
    for role, tensor in fused(a, b, options).items():
        want = 0.75 * b["n2"] + 0.25 * a["n2"] if role == "n2" else b[role]
        assert torch.allclose(tensor, want, atol=1e-4), role


def test_no_alignment_is_the_average():
    a, b = layer(0, torch.bfloat16), layer(1, torch.bfloat16)
    chunks = list(fuse_layer(a, b, SPECS, change(PLAIN, alignment="none", t=(0.25, 0.5))))
    assert [(c.role, c.slot) for c in chunks] == [(role, slot) for role in SHAPES for slot in (0, 1)]
    for chunk in chunks:
        t = (0.25, 0.5)[chunk.slot]
        want = (1 - t) * a[chunk.role].float() + t * b[chunk.role].float()
        assert chunk.diagnostics is None and chunk.values.dtype == torch.float32
        assert torch.allclose(chunk.values, want, atol=1e-6)


def test_sources_stay_as_they_are():
    a, b = layer(0), layer(1)
    before = {role: (a[role].clone(), b[role].clone()) for role in a}
    fused(a, b, change(PLAIN, restore_norm="row", output_scale=0.5))
    assert all(torch.equal(a[r], x) and torch.equal(b[r], y) for r, (x, y) in before.items())


class Recorded(dict):
    """Remembers what was read."""

    def __getitem__(self, role):
        self.read = [*getattr(self, "read", []), role]
        return super().__getitem__(role)


def test_zeroed_roles_are_read_only_where_their_plan_flows_on():
    a = Recorded(layer(0))
    zero = frozenset({"o", "o.bias", "down", "down.bias"})
    made = {c.role: c for c in fuse_layer(a, layer(1), SPECS, change(PLAIN, zero=zero))}
    assert [r for r in made if made[r].values is not None] == [r for r in SHAPES if r not in zero]
    assert a.read == [r for r in SHAPES if r not in zero - {"o"}]
    assert made["o"].diagnostics is not None and made["o"].values is None and "down" not in made

    everything = fused(layer(0), layer(1), PLAIN)
    assert all(torch.equal(made[r].values, everything[r]) for r in set(SHAPES) - zero)

    a = Recorded(layer(0))
    list(fuse_layer(a, layer(1), SPECS, change(PLAIN, zero=zero, alignment="none")))
    assert a.read == [r for r in SHAPES if r not in zero]


def test_layers_of_one_gap_share_their_plans():
    a, b = layer(0), layer(1)
    options = change(PLAIN, t=(0.0, 0.25, 1.0))
    values = {(c.role, c.slot): c.values for c in fuse_layer(a, b, SPECS, options)}
    for role in SHAPES:
        aligned, quarter, upper = (values[role, slot] for slot in range(3))
        assert torch.allclose(upper, b[role], atol=1e-6)
        assert torch.allclose(quarter, 0.75 * aligned + 0.25 * b[role], atol=1e-6)


def test_restored_norms():
    a, b = layer(0), layer(1)
    options = change(PLAIN, reg=0.3, t=0.25)
    plain = fused(a, b, options)
    rows, tensor = (fused(a, b, change(options, restore_norm=how)) for how in ("row", "tensor"))
    for role, shape in SHAPES.items():
        if len(shape) == 1:
            assert torch.equal(rows[role], plain[role]) and torch.equal(tensor[role], plain[role])
            continue
        norm_a, norm_b = a[role].norm(dim=1), b[role].norm(dim=1)
        assert tensor[role].norm().item() == pytest.approx(
            (0.75 * a[role].norm() + 0.25 * b[role].norm()).item(), rel=1e-5
        )
        # A's part is a weighted mean of its rows' norms, whatever the plan.
        part = (rows[role].norm(dim=1) - 0.25 * norm_b) / 0.75
        assert (part >= norm_a.min() - 1e-4).all() and (part <= norm_a.max() + 1e-4).all()
        assert torch.allclose(
            torch.nn.functional.normalize(rows[role]), torch.nn.functional.normalize(plain[role]), atol=1e-5
        )
    a["q"], b["q"] = torch.zeros_like(a["q"]), torch.zeros_like(b["q"])
    assert (fused(a, b, change(options, restore_norm="row"))["q"] == 0).all()


def test_output_scale_acts_on_what_writes_to_the_residual_stream():
    a, b = layer(0), layer(1)
    plain, scaled = fused(a, b, PLAIN), fused(a, b, change(PLAIN, output_scale=0.1))
    for role in SHAPES:
        factor = 0.1 if role in ("o", "o.bias", "down", "down.bias") else 1
        assert torch.allclose(scaled[role], factor * plain[role], atol=1e-7), role


def test_diagnostics_say_how_a_plan_came_about():
    options = change(PLAIN, reg="auto", unit_rows=True, cost_scale="max")
    found = {c.role: c.diagnostics for c in fuse_layer(layer(0), layer(1), SPECS, options)}
    assert {r for r, d in found.items() if d} == set(_SPACES)
    for role in _SPACES:
        assert found[role].role == role and found[role].solver == "sinkhorn"
        assert found[role].converged and found[role].marginal_error <= 1e-4
        assert found[role].effective_support == pytest.approx(2, rel=0.13)


def test_refusals():
    a, b = layer(0), layer(1)
    with pytest.raises(SolverError, match="did you mean 'sinkhorn'"):
        solver_named("sinkhron")
    with pytest.raises(SolverError, match="q: layers do not fit"):
        fused(a, b | {"q": b["q"][:, :-1]}, PLAIN)
    with pytest.raises(SolverError, match="n1: layers do not fit"):
        fused(a, b | {"n1": b["n1"][:-1]}, PLAIN)
    with pytest.raises(SolverError, match="copy_next"):
        fused(a, b | {"gate": torch.zeros(2, F, D)}, PLAIN)
    with pytest.raises(SolverError, match="v: the weights are not finite"):
        fused(a | {"v": a["v"] / 0}, b, PLAIN)
