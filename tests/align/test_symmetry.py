"""symmetry keeps A's function, undoes any planted symmetry, and never does worse than it says; float64 throughout."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import transformers
from support import make_model
from symmetries import random_symmetry

from deus_merge.align import align_layer, fuse_layer, fusion
from deus_merge.align.options import STEPS, AlignOptions
from deus_merge.models.family import families
from deus_merge.models.spec import Heads
from deus_merge.ot.problem import SolverOptions
from deus_merge.ot.solvers import assignment

H, G, SIZE, D, F = 8, 4, 6, 24, 40  # query heads, key-value groups, head size, hidden size, neurons
OPTIONS = AlignOptions(alignment="symmetry", compute_dtype="float64", zero=frozenset())
FAMILIES = {"llama": "llama", "llama_bias": "llama", "mistral": "mistral", "qwen2": "qwen2", "qwen3": "qwen3"}


def heads(family: str, query: int = H, key_value: int = G, size: int = SIZE) -> Heads:
    return Heads(query, key_value, size, families()[FAMILIES[family]].rotary)


def shapes(family: str, at: Heads) -> dict[str, tuple[int, ...]]:
    """The layer of a family by role, all biases it may have included."""
    rows = {"q": at.query * at.size, "k": at.key_value * at.size, "v": at.key_value * at.size, "gate": F, "up": F}
    made = {}
    for spec in families()[FAMILIES[family]].layer:
        role = spec.follows or spec.role
        out = rows.get(role, D)
        columns = {"o": at.query * at.size, "down": F}.get(role, D)
        if family == "llama" and spec.follows:
            continue
        made[spec.role] = (at.size,) if spec.multiplies else (out, columns) if spec.in_space else (out,)
    return made


def layer(family: str, at: Heads, seed: int, dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    made = {r: 0.3 * torch.randn(*s, generator=g, dtype=torch.float64) for r, s in shapes(family, at).items()}
    return {r: (1 + t if r in ("n1", "n2") or r.endswith("_norm") else t).to(dtype) for r, t in made.items()}


def specs(family: str, x: dict) -> list:
    return [s for s in families()[FAMILIES[family]].layer if s.role in x]


def aligned(family: str, a: dict, b: dict, options: AlignOptions) -> dict[str, torch.Tensor]:
    return {c.role: c.values for c in align_layer(a, b, specs(family, a), options)}


def planted(family: str, b: dict, at: Heads, seed: int) -> dict[str, torch.Tensor]:
    """B under a random element of the whole group of symmetries."""
    attention = random_symmetry(at, seed)
    neurons = torch.randperm(F, generator=torch.Generator().manual_seed(seed))
    moved = dict(b)
    for spec in specs(family, b):
        x = b[spec.role]
        if "neurons" in (spec.in_space, spec.out_space):
            moved[spec.role] = x[:, neurons] if spec.in_space == "neurons" else x[neurons]
        elif not spec.multiplies and {spec.in_space, spec.out_space} - {None, "residual"}:
            rows = x if x.ndim == 2 else x.unsqueeze(1)
            moved[spec.role] = attention.move(rows.double(), spec.in_space, spec.out_space).view_as(x).to(x.dtype)
    return moved


def distance(x: dict, y: dict) -> float:
    """Relative, over the whole layer."""
    top = sum((x[r].double() - y[r].double()).square().sum() for r in y)
    return math.sqrt(top / sum(y[r].double().square().sum() for r in y))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("compute_dtype", "bar"), [("float64", 1e-12), ("float32", 1e-5)])
@pytest.mark.parametrize("counts", [(8, 4, 6), (4, 4, 8), (6, 1, 4), (1, 1, 6), (6, 2, 10)])
def test_any_planted_symmetry_is_undone(family, compute_dtype, bar, counts):
    at = heads(family, *counts)
    dtype = getattr(torch, compute_dtype)
    for seed in range(3):
        b = layer(family, at, seed)
        a = planted(family, b, at, seed + 100)
        assert distance(a, b) > 0.1
        a, b = ({r: t.to(dtype) for r, t in x.items()} for x in (a, b))
        assert distance(aligned(family, a, b, replace(OPTIONS, heads=at, compute_dtype=compute_dtype)), b) < bar


@pytest.mark.parametrize("family", FAMILIES)
def test_noise_after_planting_is_all_that_remains(family):
    at = heads(family)
    b = layer(family, at, 0)
    g = torch.Generator().manual_seed(1)
    noise = {r: 0.2 * t.std().nan_to_num(0) * torch.randn(t.shape, generator=g, dtype=t.dtype) for r, t in b.items()}
    a = planted(family, {r: t + noise[r] for r, t in b.items()}, at, 2)
    got = distance(aligned(family, a, b, replace(OPTIONS, heads=at)), b)
    planted_noise = distance({r: t + noise[r] for r, t in b.items()}, b)
    assert 0.8 * planted_noise < got <= planted_noise * (1 + 1e-9)  # turns may even take some of the noise away


STEP_SETS = [STEPS, (), *[(s,) for s in STEPS], ("heads", "rotary"), ("neurons", "values")]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("steps", STEP_SETS, ids="+".join)
def test_aligned_a_computes_what_a_computes(family, steps, tmp_path):
    """A whole model in float64, its layers aligned to their upper neighbours: the same logits."""
    model = transformers.AutoModelForCausalLM.from_pretrained(make_model(tmp_path / "m", family), dtype=torch.float64)
    ids = torch.randint(0, 128, (2, 24), generator=torch.Generator().manual_seed(0))
    state = model.state_dict()
    config = model.config
    at = heads(family, 4, 2, getattr(config, "head_dim", None) or config.hidden_size // 4)
    described = [s for s in families()[FAMILIES[family]].layer if f"model.layers.0.{s.name}" in state]
    layers = [{s.role: state[f"model.layers.{i}.{s.name}"].clone() for s in described} for i in range(4)]
    with torch.no_grad():
        want = model(ids).logits
        moved = 0.0
        for i in range(3):
            options = replace(OPTIONS, heads=at, symmetry=frozenset(steps))
            for chunk in align_layer(layers[i], layers[i + 1], described, options):
                name = f"model.layers.{i}." + next(s.name for s in described if s.role == chunk.role)
                moved += (state[name] - chunk.values).abs().sum().item()
                state[name].copy_(chunk.values)
        got = model(ids).logits
    assert (moved > 1) == bool(set(steps) - {"experts"})
    assert (got - want).abs().max() < 1e-10


@pytest.mark.parametrize("restore_norm", ["none", "row", "tensor"])
@pytest.mark.parametrize("match", ["full", "partial"])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_little_memory_changes_no_bit(family, match, restore_norm, monkeypatch):
    """Neurons made when they are compared, weights fused some rows at a time and heads compared in parts, as a layer of
    a large model is: the tensors of a layer whose rows are all in memory at once."""
    at = heads(family)
    a, b = (layer(family, at, seed, torch.bfloat16) for seed in (0, 1))
    options = AlignOptions(
        alignment="symmetry", zero=frozenset({"o"}), heads=at, unit_rows=True, cost_scale="max", t=(0.25, 0.75),
        match=match, restore_norm=restore_norm, output_scale=0.5,
    )  # fmt: skip
    monkeypatch.setattr(assignment, "_DENSE", 1)
    whole = {(c.role, c.slot): c.values for c in fuse_layer(a, b, specs(family, a), options) if c.values is not None}
    monkeypatch.setattr(fusion, "_FUSED", 100)  # four rows of gate and up, two of down
    monkeypatch.setattr("deus_merge.ot.blocks.BLOCK_ELEMENTS", 300)
    little = replace(options, whole=False, solver_options=SolverOptions(memory=0))
    parts: dict[tuple[str, int], list] = {}
    for chunk in fuse_layer(a, b, specs(family, a), little):
        if chunk.values is not None:
            parts.setdefault((chunk.role, chunk.slot), []).append(chunk)
    assert parts.keys() == whole.keys()
    for key, chunks in parts.items():
        filled = 0
        for chunk in chunks:
            assert (chunk.start or 0) == filled
            filled += chunk.values.numel()
        got = torch.cat([chunk.values.flatten() for chunk in chunks]).view_as(whole[key])
        assert torch.equal(got, whole[key]), key
        assert (len(chunks) > 1) == (key[0] in ("gate", "up", "down") and restore_norm != "tensor")


def test_heads_in_parts_are_the_same_alignment(monkeypatch):
    at = heads("llama")
    a, b = (layer("llama", at, seed) for seed in (3, 4))
    options = replace(OPTIONS, heads=at)
    whole = aligned("llama", a, b, options)
    monkeypatch.setattr("deus_merge.align.heads.ELEMENTS", 2 * SIZE * D)  # two heads
    got = aligned("llama", a, b, options)
    for role in ("q", "k", "v", "o"):
        assert (got[role] - whole[role]).abs().max() < 1e-12, role
