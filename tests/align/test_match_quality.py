"""The matches of ``symmetry`` are optimal: beside independent float64 evaluations of the stated objectives.

Planted symmetries are found by almost any score. On layers that merely resemble each other, or do not, the choice shows
which objective is optimised.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations, product

import numpy as np
import pytest
import torch
from scipy.linalg import orthogonal_procrustes
from scipy.optimize import linear_sum_assignment
from test_symmetry import FAMILIES, OPTIONS, heads, layer, specs

from deus_merge.align import align_layer
from deus_merge.models.family import families
from deus_merge.models.head_layout import layer_heads
from deus_merge.models.reference import ModelRef
from deus_merge.models.source import SourceModel
from deus_merge.models.spec import Heads

COUNTS = (6, 3, 4)  # query heads, key-value groups, head size: few enough to try all matches


def uneven(family: str, at: Heads, seed: int) -> dict[str, torch.Tensor]:
    """A random layer whose norm weights and matrix scales differ widely, as those of trained models do."""
    x, g = layer(family, at, seed), torch.Generator().manual_seed(seed + 1000)
    for role in ("n1", "n2"):
        x[role] = torch.exp(1.5 * torch.randn(x[role].shape, generator=g, dtype=torch.float64))
    for role, scale in (("gate", 4.0), ("up", 0.25), ("down", 8.0), ("o", 3.0), ("v", 0.2)):
        x[role] = scale * x[role]
    return x


def trained(tiny, index: int) -> tuple[dict[str, torch.Tensor], Heads]:
    source = SourceModel.open(ModelRef(str(tiny)), {})
    found = {r: source.checkpoint.read(n).double() for r, n in source.view.layers[index].items()}
    at = layer_heads(source.checkpoint.config, source.view)
    assert at is not None
    return found, at


@pytest.fixture(params=[*FAMILIES, "trained"])
def pair(request, tiny):
    """(family, heads, A, B), float64."""
    if request.param == "trained":
        (a, at), (b, _) = trained(tiny, 0), trained(tiny, 1)
        return "llama", at, a, b
    at = heads(request.param, *COUNTS)
    return request.param, at, uneven(request.param, at, 1), uneven(request.param, at, 2)


def neurons(x: dict[str, torch.Tensor]) -> list[np.ndarray]:
    """The parts of each neuron, (f, e) each: its weights as they act on the normed input, and the weights it feeds."""
    n2, parts = x["n2"].numpy(), []
    for role in ("gate", "up"):
        rows = x[role].numpy() * n2
        parts.append(np.column_stack([rows, x[f"{role}.bias"].numpy()]) if f"{role}.bias" in x else rows)
    return [*parts, x["down"].numpy().T]


@pytest.mark.parametrize("unit_rows", [False, True])
def test_neurons_are_matched_at_the_least_cost(pair, unit_rows):
    family, at, a, b = pair
    options = replace(OPTIONS, heads=at, symmetry=frozenset({"neurons"}), unit_rows=unit_rows)
    got = {c.role: c for c in align_layer(a, b, specs(family, a), options)}
    sides = [[], []]
    for parts in zip(neurons(a), neurons(b), strict=True):
        mean = np.mean([np.linalg.norm(part, axis=1).mean() for part in parts])
        for side, part in zip(sides, parts, strict=True):
            side.append(part / mean)
    x, y = (np.concatenate(side, axis=1) for side in sides)  # (f, e) each
    if unit_rows:
        x, y = (z / np.linalg.norm(z, axis=1, keepdims=True) for z in (x, y))
    cost = np.linalg.norm(x[:, None] - y[None], axis=2)  # (f, f)
    rows = [
        int((a["gate"] == row).all(1).nonzero()) for row in got["gate"].values
    ]  # A's neuron in place of each of B's
    assert sorted(rows) == list(range(len(cost)))
    best = cost[linear_sum_assignment(cost)].sum()
    assert cost[rows, range(len(rows))].sum() == pytest.approx(best, rel=1e-12)
    assert torch.equal(got["up"].values, a["up"][rows]) and torch.equal(got["down"].values, a["down"][:, rows])
    if "gate.bias" in a:
        assert torch.equal(got["gate.bias"].values, a["gate.bias"][rows])
    diagnostics = got["gate"].diagnostics
    assert diagnostics.transport_cost == pytest.approx(best / len(rows), rel=1e-9)
    cosine = (x[rows] * y).sum(1) / np.linalg.norm(x[rows], axis=1) / np.linalg.norm(y, axis=1)
    assert diagnostics.cosine == pytest.approx(cosine.mean(), rel=1e-9) and diagnostics.fused == len(rows)
    before = (x * y).sum(1) / np.linalg.norm(x, axis=1) / np.linalg.norm(y, axis=1)
    assert diagnostics.cosine_before == pytest.approx(before.mean(), rel=1e-9) and rows != list(range(len(rows)))


def by_head(family: str, x: dict[str, torch.Tensor], at: Heads) -> dict[str, np.ndarray]:
    """q, k, v (heads, h, e), as they act on the normed input, the bias as a last column; o (heads, d, h)."""
    found = {}
    for role, count in (("q", at.query), ("k", at.key_value), ("v", at.key_value)):
        weight = x[role].numpy() * x["n1"].numpy()
        if f"{role}.bias" in x:
            weight = np.column_stack([weight, x[f"{role}.bias"].numpy()])
        if f"{role}_norm" in x:
            weight = weight * np.tile(x[f"{role}_norm"].numpy(), count)[:, None]
        found[role] = weight.reshape(count, at.size, -1)
    found["o"] = x["o"].numpy().reshape(-1, at.query, at.size).transpose(1, 0, 2)
    return found


def pairs_of(rows: np.ndarray) -> np.ndarray:
    """Components j and j + h/2 as complex numbers: (h, e) -> (h/2, e)."""
    half = len(rows) // 2
    return rows[:half] + 1j * rows[half:]


def scores_of(a: dict, b: dict, at: Heads) -> np.ndarray:
    """The score of A's head i in place of B's head j, (H, H), from the whole matrices that the heads compute."""
    share = at.query // at.key_value

    def value(side: dict, i: int) -> np.ndarray:
        return side["o"][i] @ side["v"][i // share]  # (d, e)

    def inner(x: dict, i: int, y: dict, j: int) -> float:
        """Of the query-key path."""
        q = (pairs_of(x["q"][i]).conj() * pairs_of(y["q"][j])).sum(1)  # (h/2,)
        k = (pairs_of(x["k"][i // share]).conj() * pairs_of(y["k"][j // share])).sum(1)
        if at.rotary == "signs":
            return (q.real * k.real).sum()
        return (q * k.conj()).real.sum()

    def cosine(i: int, j: int) -> float:
        left, right = value(a, i), value(b, j)
        path = (left * right).sum() / np.linalg.norm(left) / np.linalg.norm(right)
        return path + inner(a, i, b, j) / np.sqrt(inner(a, i, a, i) * inner(b, j, b, j))

    return np.array([[cosine(i, j) for j in range(at.query)] for i in range(at.query)])


def test_heads_are_matched_at_the_highest_score(pair):
    family, at, a, b = pair
    share = at.query // at.key_value
    options = replace(OPTIONS, heads=at, symmetry=frozenset({"heads"}))
    got = {c.role: c for c in align_layer(a, b, specs(family, a), options)}
    found = got["q"].diagnostics
    scores = scores_of(by_head(family, a, at), by_head(family, b, at), at)
    before = scores.diagonal().mean()
    assert found.value_cosine_before + found.query_key_cosine_before == pytest.approx(before, rel=1e-9)
    best = -np.inf
    for groups in permutations(range(at.key_value)):
        for inside in product(permutations(range(share)), repeat=at.key_value):
            queries = [g * share + j for g, order in zip(groups, inside, strict=True) for j in order]
            best = max(best, scores[queries, range(at.query)].sum())
    assert [q // share for q in found.queries[::share]] == list(found.groups)
    chosen = scores[list(found.queries), range(at.query)]
    assert chosen.sum() == pytest.approx(best, rel=1e-9)
    assert found.value_cosine + found.query_key_cosine == pytest.approx(chosen.mean(), rel=1e-9)
    for role, order in (("q", found.queries), ("k", found.groups), ("v", found.groups)):
        moved, stored = (x.view(len(order), at.size, -1) for x in (got[role].values, a[role]))
        assert torch.equal(moved, stored[list(order)])
    moved, stored = (x.view(len(x), at.query, at.size) for x in (got["o"].values, a["o"]))
    assert torch.equal(moved, stored[:, list(found.queries)])


def test_values_are_turned_by_the_nearest_orthogonal_matrix(pair):
    family, at, a, b = pair
    share = at.query // at.key_value
    options = replace(OPTIONS, heads=at, symmetry=frozenset({"values"}))
    got = {c.role: c.values for c in align_layer(a, b, specs(family, a), options)}
    sides = by_head(family, a, at), by_head(family, b, at)
    for g in range(at.key_value):
        # rows of v and columns of o of all heads of the group, side by side: (h, e + d·H/G)
        x, y = (
            np.concatenate([side["v"][g], *[side["o"][i].T for i in range(g * share, (g + 1) * share)]], axis=1)
            for side in sides
        )
        turn = orthogonal_procrustes(x.T, y.T)[0].T  # (h, h)
        rows = slice(g * at.size, (g + 1) * at.size)
        assert np.allclose(got["v"][rows].numpy(), turn @ a["v"][rows].numpy(), atol=1e-9)
        for i in range(g * share, (g + 1) * share):
            columns = slice(i * at.size, (i + 1) * at.size)
            assert np.allclose(got["o"][:, columns].numpy(), a["o"][:, columns].numpy() @ turn.T, atol=1e-9)


def test_rotary_pairs_are_turned_by_the_nearest_angle(pair):
    """Each pair of queries and keys comes as close to B's as any angle of a fine grid brings it."""
    family, at, a, b = pair
    share = at.query // at.key_value
    options = replace(OPTIONS, heads=at, symmetry=frozenset({"rotary"}))
    moved = a | {c.role: c.values for c in align_layer(a, b, specs(family, a), options)}
    x, y, z = (by_head(family, side, at) for side in (a, b, moved))
    angles = np.array([0, np.pi]) if at.rotary == "signs" else np.linspace(0, 2 * np.pi, 2001)
    for g in range(at.key_value):

        def stacked(side: dict, g: int = g) -> np.ndarray:
            """Keys and queries of the group, (h/2, e·(1 + H/G))"""
            queries = [pairs_of(side["q"][i]) for i in range(g * share, (g + 1) * share)]
            return np.concatenate([pairs_of(side["k"][g]), *queries], axis=1)

        off = (abs(stacked(z) - stacked(y)) ** 2).sum(1)  # (h/2,)
        grid = [(abs(np.exp(1j * t) * stacked(x) - stacked(y)) ** 2).sum(1) for t in angles]
        assert (off <= np.min(grid, axis=0) * (1 + 1e-9)).all()
        assert (off < 0.9999 * grid[0]).any()  # the turns are not the identity


def test_families_cover_every_kind_of_rotary():
    assert {families()[f].rotary for f in FAMILIES.values()} == {"phases", "signs"}
