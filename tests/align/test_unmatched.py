"""Rows of B that match nothing stay B's own: with ``unbalanced``, in both alignments and in both ways to call them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from support import make_model, weights, write_recipe
from test_symmetry import OPTIONS, heads, specs
from test_symmetry import layer as symmetric_layer
from test_transport_flow import HEADS, PLAIN, SPECS, H, change, layer

from deus_merge.align import align_layer, fuse_layer
from deus_merge.align.fusion import choose
from deus_merge.core.errors import SolverError
from deus_merge.ot.problem import SolverOptions
from deus_merge.ot.solvers.unbalanced import Unbalanced

SOLVER = Unbalanced(marginal_penalty=0.05)
FAR = {"q": 7, "v": 2, "o": 3, "gate": 5, "up": 9, "down": 11}  # role -> the row that nothing resembles


def values(chunks, slot: int = 0) -> dict[str, torch.Tensor]:
    return {c.role: c.values for c in chunks if c.slot == slot and c.values is not None}


def sides() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """A, and a B that is almost A but for one row of each matrix."""
    a, other = layer(0), layer(1)
    b = {role: x + 1e-3 * other[role] for role, x in a.items()}
    for role, row in FAR.items():
        b[role][row] += 100
    return a, b


def near(x: torch.Tensor, y: torch.Tensor, limit: float = 0.05) -> bool:
    """Within what the entropic plan mixes in, and norms to ``limit``: they are closer where they are restored."""
    return ((x - y).norm() < 0.1 * y.norm() and (x.norm() / y.norm() - 1).abs() < limit).item()


def own(got: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    """Exactly the unmatched rows, columns and entries are B's."""
    for role, row in FAR.items():
        rows = (got[role] == b[role]).all(1)  # (m,)
        assert rows.nonzero().flatten().tolist() == [row], role
        if f"{role}.bias" in b:
            assert (got[f"{role}.bias"] == b[f"{role}.bias"]).nonzero().flatten().tolist() == [row], role
    for role in ("gate", "up"):  # the plan of o flows on into their columns, and into n2
        assert (got[role] == b[role]).all(0).nonzero().flatten().tolist() == [FAR["o"]], role
    assert (got["n2"] == b["n2"]).nonzero().flatten().tolist() == [FAR["o"]]


@pytest.mark.parametrize("restore_norm", ["none", "row", "tensor"])
@pytest.mark.parametrize("t", [0.5, 0.3])
def test_fused_rows_that_match_nothing_are_b(restore_norm, t):
    a, b = sides()
    options = change(PLAIN, solver=SOLVER, reg=0.05, restore_norm=restore_norm, t=t)
    chunks = list(fuse_layer(a, b, SPECS, options))
    got = values(chunks)
    own(got, b)
    for role, row in FAR.items():
        others = torch.arange(len(b[role])) != row
        columns = torch.arange(b[role].shape[1]) != (FAR["o"] if role in ("gate", "up") else -1)
        want = (1 - t) * a[role] + t * b[role]
        assert near(
            got[role][others][:, columns], want[others][:, columns], 0.05 if restore_norm == "none" else 0.009
        ), role
    found = {c.role: c.diagnostics for c in chunks if c.diagnostics is not None}
    for role in FAR:
        assert found[role].fused == len(b[role]) - 1
        assert found[role].cosine > 0.9, role  # of the rows that match
        matched = torch.arange(len(b[role])) != FAR[role]
        before = torch.cosine_similarity(a[role], b[role])[matched].mean().item()  # of A as stored, of the same rows
        assert found[role].cosine_before == pytest.approx(before, abs=1e-5), role
    # A per-head norm is averaged over the heads, with B's own entry where that head's row matches nothing.
    entry = FAR["q"] % H
    want = (1 - t) * ((HEADS - 1) * a["q_norm"] + b["q_norm"])[entry] / HEADS + t * b["q_norm"][entry]
    assert got["q_norm"][entry] == pytest.approx(want.item(), abs=2e-2)


def test_aligned_rows_that_match_nothing_are_b():
    a, b = sides()
    got = values(align_layer(a, b, SPECS, change(PLAIN, solver=SOLVER, reg=0.05)))
    own(got, b)
    for role, row in FAR.items():
        others = torch.arange(len(b[role])) != row
        columns = torch.arange(b[role].shape[1]) != (FAR["o"] if role in ("gate", "up") else -1)
        assert near(got[role][others][:, columns], a[role][others][:, columns]), role


@pytest.mark.parametrize(("fraction", "scale"), [(0.5, 1.0), (1.0, 1.0), (1.0, 0.5)])
def test_partial_matches_choose_among_the_rows_that_match(fraction, scale):
    """However many are to be fused, the unmatched are not among them; an output scale acts on B's own rows, too."""
    a, b = sides()
    options = change(PLAIN, solver=SOLVER, reg=0.05, match="partial", match_fraction=fraction, output_scale=scale)
    chunks = list(fuse_layer(a, b, SPECS, options))
    got = values(chunks)
    for role, row in FAR.items():
        factor = scale if role in ("o", "down") else 1.0
        same = (got[role] == factor * b[role]).all(1)
        assert same[row]
        fused = min(round(fraction * len(same)), len(same) - 1)
        assert (~same).sum() == fused
        diagnostics = next(c.diagnostics for c in chunks if c.role == role)
        assert diagnostics.fused == fused


def test_the_unmatched_are_the_last_to_be_chosen():
    scores = torch.tensor([-0.5, 0.0, -0.2, 0.9])
    unmatched = torch.tensor([False, True, False, False])
    options = change(PLAIN, match="partial", match_fraction=0.75)
    found = choose(scores, "row", "q", options, unmatched)
    assert found.chosen.tolist() == [True, False, True, True] and found.count == 3
    assert found.cosine == pytest.approx(0.2 / 3)
    with pytest.raises(SolverError, match="the best of 4 has -0.2"):
        choose(scores[:3].repeat(2)[:4], "row", "q", change(options, match_score=0.0), unmatched)
    full = choose(scores, "row", "q", PLAIN, unmatched)
    assert torch.equal(full.chosen, ~unmatched) and full.count == 3
    assert choose(scores, "row", "q", PLAIN).chosen is None


def test_a_zeroed_writer_whose_rows_match_nothing_leaves_its_bias_and_the_flow_to_b():
    a, b = sides()
    shares = (0.1, 0.2, 0.3, 0.45, 0.6, 0.7)
    options = change(PLAIN, solver=SOLVER, reg=0.05, zero=frozenset({"o"}), t=shares)
    chunks = list(fuse_layer(a, b, SPECS, options))
    for slot in range(len(shares)):
        got = values(chunks, slot)
        assert "o" not in got
        assert (got["o.bias"] == b["o.bias"]).nonzero().flatten().tolist() == [FAR["o"]]
        assert (got["n2"] == b["n2"]).nonzero().flatten().tolist() == [FAR["o"]]


@pytest.mark.parametrize("entry", ["fuse", "align"])
@pytest.mark.parametrize("restore_norm", ["none", "row", "tensor"])
def test_neurons_that_match_nothing_are_b(entry, restore_norm):
    """One plan moves gate, up, down and the biases of neurons: all of them keep B's neuron."""
    at, far = heads("llama_bias"), 5
    a, other = symmetric_layer("llama_bias", at, 0), symmetric_layer("llama_bias", at, 1)
    b = {role: x + 1e-3 * other[role] for role, x in a.items()}
    for role in ("gate", "up"):
        b[role][far] += 100
    b["down"][:, far] += 100
    options = replace(OPTIONS, heads=at, solver=SOLVER, solver_options=SolverOptions(reg=0.02))
    options = replace(options, restore_norm=restore_norm, t=0.3)
    call = fuse_layer if entry == "fuse" else align_layer
    chunks = list(call(a, b, specs("llama_bias", a), options))
    got, t = values(chunks), 0.3 if entry == "fuse" else 0.0
    for role, x in b.items():
        if role in ("gate", "up", "gate.bias", "up.bias", "down"):
            one, two = (got[role].t(), x.t()) if role == "down" else (got[role], x)
            same = one == two
            assert (same.all(1) if same.ndim == 2 else same).nonzero().flatten().tolist() == [far], role
            others = torch.arange(len(two)) != far
            was = a[role].t() if role == "down" else a[role]
            restored = restore_norm != "none" and entry == "fuse" and one.ndim == 2
            assert near(one[others], ((1 - t) * was + t * two)[others], 0.002 if restored else 0.05), role
    found = next(c.diagnostics for c in chunks if c.role == "gate")
    assert found.fused == len(b["gate"]) - 1 and found.cosine > 0.9


SETTINGS = "alignment: transport_flow, solver: unbalanced, marginal_penalty: 0.5, unit_rows: false, cost_scale: none"


def test_recipes_keep_rows_that_match_nothing(run, tmp_path):
    base = make_model(tmp_path / "base", layers=2)
    tensors = weights(base)
    upper = "model.layers.1.mlp.gate_proj.weight"
    tensors[upper][4] += 50
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    text = f"base_model: {base}\nupscale: {{insert: all, parameters: {{{SETTINGS}, reg: 0.1}}}}\n"
    run("merge", write_recipe(tmp_path / "r.yml", text), tmp_path / "out")
    ours, new = weights(tmp_path / "out"), "model.layers.1.mlp.gate_proj.weight"
    same = (ours[new] == ours["model.layers.2.mlp.gate_proj.weight"]).all(1)
    assert torch.equal(ours["model.layers.2.mlp.gate_proj.weight"], tensors[upper])
    assert same.nonzero().flatten().tolist() == [4]

    other = make_model(tmp_path / "other", layers=2, seed=9)
    text = (
        f"base_model: {base}\nmerge_method: linear\nalign: {{{SETTINGS}, reg: 0.1}}\nmodels:\n"
        f"  - {{model: {other}, parameters: {{weight: 1}}}}\n  - {{model: {base}, parameters: {{weight: 0}}}}\n"
    )
    run("merge", write_recipe(tmp_path / "a.yml", text), tmp_path / "aligned")
    same = (weights(tmp_path / "aligned")[upper] == tensors[upper]).all(1)
    assert same.nonzero().flatten().tolist() == [4]
