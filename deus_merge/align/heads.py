"""The attention half of ``alignment: symmetry``: which head matches which, and how its two inner spaces are turned.

A query head works with its key-value group. The function of attention does not change under

- a permutation of the G groups, their query heads going along, and of the H/G query heads inside a group;
- an orthogonal R (h, h) on a group's values: ``v <- R v``, ``o_j <- o_j Rᵀ`` for every query head j of the group;
- a turn of a rotary pair of components (j and j + r/2, or 2j and 2j + 1, of the first r) of a group's keys and of all
  its queries: it commutes with the rotary embedding. Per-head norm weights scale the two components differently; then
  only half a turn, a sign, is left. The components that are not rotary stay as they are.

Heads are compared by scores that none of these turns changes (git re-basin, arXiv 2209.04836, for the idea of aligning
by the symmetries of the function): for the value path ``⟨o_A v_A, o_B v_B⟩``,
for the query-key path ``Σ_j Re((q_Aᴴ q_B)_j conj (k_Aᴴ k_B)_j)``, each over the norms of both sides.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..core.errors import SolverError
from ..core.units import is_finite
from ..models.spec import Heads
from ..ot.blocks import row_blocks

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

#: Elements of a product, or of heads in float64, that are in memory at once: 128 MiB of float32.
ELEMENTS = 1 << 25


@dataclass(frozen=True, eq=False)
class AttentionAlignment:
    """The transform of A's attention.

    Attributes:
        groups: G of them: A's group that takes the place of B's group g.
        queries: H of them: A's query head that takes the place of B's query head i.
        values: (G, h, h) float64: R of the group in place g. This and ``turns`` are None where that step is not taken.
        turns: (G, r/2) complex128 of absolute value 1: the turn of each rotary pair.
        scores: (G,) mean of value and query-key cosines of each group with its match.
        value_cosine, query_key_cosine: Means over the query heads, after matching.
        value_cosine_before, query_key_cosine_before: Means over the query heads that have the same number.
        heads: The layer's heads.
    """

    groups: tuple[int, ...]
    queries: tuple[int, ...]
    values: Tensor | None
    turns: Tensor | None
    scores: Tensor
    value_cosine: float
    query_key_cosine: float
    value_cosine_before: float
    query_key_cosine_before: float
    heads: Heads

    def move(self, weight: Tensor, in_space: str | None, out_space: str) -> Tensor:
        """A's weight in B's order.

        Args:
            weight: q, k or v (n·h, d), a bias of theirs (n·h, 1), or o (d, H·h).
            in_space, out_space: Its spaces.
        """
        if in_space == "value_heads":
            return self._move_outputs(weight)
        rows = self.permute(weight, out_space)
        if out_space == "value_heads" and self.values is not None:
            by_head = rows.unflatten(0, (len(self.groups), -1))  # (G, h, d)
            return (self.values.to(rows) @ by_head).flatten(0, 1)
        if out_space in ("query_heads", "key_heads") and self.turns is not None:
            count = len(self.queries if out_space == "query_heads" else self.groups)
            turns = self.turns.repeat_interleave(count // len(self.groups), 0)  # (n, r/2)
            return turn(rows.unflatten(0, (count, -1)), turns, self.heads).flatten(0, 1)
        return rows

    def permute(self, rows: Tensor, out_space: str) -> Tensor:
        """Rows (n·m, d) in the order of B's heads, without any turn."""
        order = self.groups if out_space in ("key_heads", "value_heads") else self.queries
        return _take(rows.unflatten(0, (len(order), -1)), order).flatten(0, 1)

    def _move_outputs(self, weight: Tensor) -> Tensor:
        """o: (d, H·h) -> (d, H·h)."""
        heads = _take(weight.view(len(weight), len(self.queries), -1), self.queries, 1)  # (d, H, h)
        if self.values is None:
            return heads.flatten(1)
        grouped = heads.unflatten(1, (len(self.groups), -1)).transpose(0, 1)  # (G, d, H/G, h)
        moved = grouped.flatten(1, 2) @ self.values.to(weight).transpose(1, 2)  # (G, d·H/G, h)
        return moved.view(grouped.shape).transpose(0, 1).flatten(1)


def align_heads(
    a: Mapping[str, Tensor], b: Mapping[str, Tensor], heads: Heads, steps: frozenset[str]
) -> AttentionAlignment:
    """The transform that brings A's attention closest to B's.

    Args:
        a, b: ``q`` (H·h, e), ``k`` (G·h, e) and ``v`` (G·h_v, e), each in the order of B's inputs, with the input
            norm's weight folded in and a bias as one more column, and ``o`` (d, H·h_v); float32 or float64.
        heads: Their numbers.
        steps: The steps to take, of ``heads``, ``values``, ``rotary``.

    Raises:
        SolverError: NaN or infinity among the weights, or their products overflow.
    """
    import torch

    g, per_group = heads.key_value, heads.query // heads.key_value
    value, query_key = _value_scores(a, b, heads), _query_key_scores(a, b, heads)  # (H, H) each
    scores = (value + query_key).double().cpu()  # (H, H), on the host, where they are assigned
    if not is_finite(scores):
        raise SolverError(
            "the attention heads cannot be compared",
            expected="finite weights, whose products are finite",
            hint="look for NaN in the sources, or compute in float64 (compute_dtype)",
        )
    groups, queries = tuple(range(g)), tuple(range(heads.query))
    if "heads" in steps:
        groups, queries = _match(scores, g, per_group)
    matched = [_take(x, queries).diagonal().clone() for x in (value, query_key)]  # (H,) each
    unmatched = [x.diagonal().clone() for x in (value, query_key)]  # (H,) each
    value_cosine, query_key_cosine, value_before, query_key_before = torch.stack(
        [x.mean() for x in (*matched, *unmatched)]
    ).tolist()
    pairs = _Pairs(_split(a, heads), _split(b, heads), groups, queries)
    return AttentionAlignment(
        groups,
        queries,
        _procrustes(pairs) if "values" in steps else None,
        _turns(pairs, heads) if "rotary" in steps and heads.rotary != "none" else None,
        (matched[0] + matched[1]).view(g, per_group).mean(1) / 2,
        value_cosine,
        query_key_cosine,
        value_before,
        query_key_before,
        heads,
    )


def turn(rows: Tensor, turns: Tensor, heads: Heads) -> Tensor:
    """Multiply the rotary pairs of components of every head, as complex numbers, by theirs.

    Args:
        rows: (n, h, d).
        turns: (n, r/2) complex, of absolute value 1.
        heads: Which components are pairs.
    """
    import torch

    first, second = rotary_pairs(rows, heads)  # (n, r/2, d) each
    cos, sin = (part.to(rows).unsqueeze(2) for part in (turns.real, turns.imag))  # (n, r/2, 1)
    moved = torch.empty_like(rows)
    for place, values in zip(
        rotary_pairs(moved, heads), (first * cos - second * sin, first * sin + second * cos), strict=True
    ):
        place.copy_(values)
    still = _still(rows, heads)
    _still(moved, heads).copy_(still)
    return moved


def rotary_pairs(rows: Tensor, heads: Heads) -> tuple[Tensor, Tensor]:
    """Views of the first and of the second components of all rotary pairs: (n, h, ..) -> (n, r/2, ..) each."""
    r = heads.size if heads.rotary_size is None else heads.rotary_size
    rotary = rows[:, :r]
    return (rotary[:, ::2], rotary[:, 1::2]) if heads.interleaved else (rotary[:, : r // 2], rotary[:, r // 2 :])


def _still(rows: Tensor, heads: Heads) -> Tensor:
    """A view of the components that are not rotary: (n, h, ..) -> (n, h - r, ..)."""
    return rows[:, heads.size if heads.rotary_size is None else heads.rotary_size :]


def _take(heads: Tensor, order: tuple[int, ...], axis: int = 0) -> Tensor:
    """The heads of an axis in another order."""
    import torch

    return heads.index_select(axis, torch.tensor(order, device=heads.device))


def _split(side: Mapping[str, Tensor], heads: Heads) -> dict[str, Tensor]:
    """q (H, h, e), k (G, h, e), v (G, h_v, e), o (H, d, h_v), as views."""
    split = {r: side[r].view(n, heads.size, -1) for r, n in (("q", heads.query), ("k", heads.key_value))}
    split["v"] = side["v"].view(heads.key_value, heads.values, -1)
    split["o"] = side["o"].view(-1, heads.query, heads.values).transpose(0, 1)
    return split


def _value_scores(a: Mapping[str, Tensor], b: Mapping[str, Tensor], heads: Heads) -> Tensor:
    """Cosine of ``o_i v_i`` of A with ``o_j v_j`` of B as linear maps, for every pair of query heads: (H, H)."""
    import torch

    per_group, h = heads.query // heads.key_value, heads.values

    def inner(x: Mapping[str, Tensor], y: Mapping[str, Tensor]) -> Tensor:
        values = (x["v"] @ y["v"].t()).view(heads.key_value, h, heads.key_value, h)
        found = []
        for part in row_blocks(heads.query, h * heads.query * h, ELEMENTS):
            own = x["o"][:, part.start * h : part.stop * h]  # (d, p·h)
            outputs = (own.t() @ y["o"]).view(-1, h, heads.query, h)  # (p, h, H, h)
            groups = torch.arange(part.start, part.stop, device=values.device) // per_group  # (p,)
            wide = values[groups].repeat_interleave(per_group, 2)  # (p, h, H, h)
            found.append((outputs * wide).sum((1, 3)))
        return torch.cat(found)

    own_a, own_b = _own_value_norms(a, heads), _own_value_norms(b, heads)  # (H,) each
    return _over_norms(inner(a, b), own_a, own_b)


def _own_value_norms(side: Mapping[str, Tensor], heads: Heads) -> Tensor:
    """‖o_i v_i‖ of each query head, (H,)."""
    import torch

    split = _split(side, heads)
    outputs = torch.cat([o.transpose(1, 2) @ o for o in map(split["o"].__getitem__, _few(split["o"]))])  # (H, h, h)
    values = (split["v"] @ split["v"].transpose(1, 2)).repeat_interleave(heads.query // heads.key_value, 0)  # (H, h, h)
    return (outputs * values).sum((1, 2)).clamp_min(0).sqrt()


def _query_key_scores(a: Mapping[str, Tensor], b: Mapping[str, Tensor], heads: Heads) -> Tensor:
    """Cosine of what the queries and keys of two heads compute, whatever their pairs' turns: (H, H)."""
    import torch

    per_group = heads.query // heads.key_value

    def products(x: Tensor, y: Tensor, n: int) -> Tensor:
        """xᴴ y of every frequency and every pair of heads, (n·h, e), (n·h, e) -> (h - r/2, n, n) complex (or real); for
        components that are not rotary x y of each."""
        x, y = (z.unflatten(0, (n, heads.size)) for z in (x, y))  # (n, h, e)
        if heads.rotary == "none":
            return _dots(x, y)
        (x1, x2), (y1, y2) = rotary_pairs(x, heads), rotary_pairs(y, heads)  # (n, r/2, e) each
        real = torch.cat((_dots(x1, y1) + _dots(x2, y2), _dots(_still(x, heads), _still(y, heads))))
        if heads.rotary == "signs":
            return real
        imaginary = torch.zeros_like(real)
        imaginary[: x1.shape[1]] = _dots(x1, y2) - _dots(x2, y1)
        return torch.complex(real, imaginary)

    def inner(x: Mapping[str, Tensor], y: Mapping[str, Tensor]) -> Tensor:
        queries, keys = products(x["q"], y["q"], heads.query), products(x["k"], y["k"], heads.key_value)
        keys = keys.repeat_interleave(per_group, 1).repeat_interleave(per_group, 2)  # (h - r/2, H, H)
        return (queries * keys.conj()).real.sum(0) if keys.is_complex() else (queries * keys).sum(0)

    own_a, own_b = (inner(x, x).diagonal().clamp_min(0).sqrt() for x in (a, b))  # (H,) each
    return _over_norms(inner(a, b), own_a, own_b)


def _dots(x: Tensor, y: Tensor) -> Tensor:
    """x yᵀ over the inputs, of each component: (n, c, e), (m, c, e) -> (c, n, m)."""
    import torch

    x, y = x.transpose(0, 1), y.permute(1, 2, 0)  # (c, n, e), (c, e, m)
    return torch.cat([x[some] @ y[some] for some in _few(x)])


def _over_norms(inner: Tensor, norm_a: Tensor, norm_b: Tensor) -> Tensor:
    norms = norm_a.unsqueeze(1) * norm_b  # (H, H)
    return inner / norms.where(norms > 0, 1)


def _match(scores: Tensor, g: int, per_group: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The best heads inside every pair of groups, then the best groups: (H, H) -> G and H numbers, A's for each of B's.

    Args:
        scores: (H, H) float64, on the host.
        g: G.
        per_group: H/G.
    """
    from scipy.optimize import linear_sum_assignment

    table = scores.view(g, per_group, g, per_group).transpose(1, 2).numpy()  # (G, G, H/G, H/G)
    inside = {(i, j): linear_sum_assignment(table[i, j].T, maximize=True)[1] for i in range(g) for j in range(g)}
    own = range(per_group)
    totals = [[table[i, j][inside[i, j], own].sum() for i in range(g)] for j in range(g)]  # B's group by A's
    groups = linear_sum_assignment(totals, maximize=True)[1].tolist()  # (G,)
    queries = [i * per_group + k for j, i in enumerate(groups) for k in inside[i, j].tolist()]
    return tuple(groups), tuple(queries)


def best_order(scores: Tensor, groups: int) -> tuple[int, ...]:
    """A's in place of each of B's, so that the sum of the scores is largest: (n, n) float64 on the host -> n numbers.

    Args:
        scores: Of A's (rows) with B's (columns).
        groups: Consecutive ones that stay together.
    """
    return _match(scores, groups, len(scores) // groups)[1]


@dataclass(frozen=True, eq=False)
class _Pairs:
    """The heads of both sides that belong together.

    Attributes:
        a, b: By role, as `_split` gives them.
        groups, queries: A's for each of B's.
    """

    a: Mapping[str, Tensor]
    b: Mapping[str, Tensor]
    groups: tuple[int, ...]
    queries: tuple[int, ...]

    def few(self, role: str) -> Iterator[tuple[Tensor, Tensor]]:
        """The heads of A and of B in float64, in order, some at a time."""
        order = self.queries if role in ("q", "o") else self.groups
        for some in _few(self.b[role]):
            yield _take(self.a[role], order[some]).double(), self.b[role][some].double()


def _few(heads: Tensor) -> list[slice]:
    """The first axis in parts of at most `ELEMENTS` elements; (n, ..), n may be 0."""
    return list(row_blocks(len(heads), heads[:1].numel(), ELEMENTS)) or [slice(0, 0)]


def _procrustes(pairs: _Pairs) -> Tensor:
    """R of each group: the orthogonal matrix nearest to ``v_B v_Aᵀ + Σ_j o_B,jᵀ o_A,j``, in float64; (G, h, h)."""
    import torch

    outputs = torch.cat([b.transpose(1, 2) @ a for a, b in pairs.few("o")])  # (H, h, h)
    moment = torch.cat([b @ a.transpose(1, 2) for a, b in pairs.few("v")])  # (G, h, h)
    left, _, right = torch.linalg.svd(moment + outputs.view(len(moment), -1, *outputs.shape[1:]).sum(1))
    return left @ right


def _turns(pairs: _Pairs, heads: Heads) -> Tensor:
    """The turn of each pair that brings A's queries and keys closest to B's; (G, r/2) complex128."""
    import torch

    def moment(x: Tensor, y: Tensor) -> Tensor:
        """Σ y conj x over the inputs, of each head and pair: (n, h, e), (n, h, e) -> (n, r/2) complex."""
        (x1, x2), (y1, y2) = rotary_pairs(x, heads), rotary_pairs(y, heads)  # (n, r/2, e)
        return torch.complex((x1 * y1 + x2 * y2).sum(2), (x1 * y2 - x2 * y1).sum(2))

    queries, keys = (torch.cat([moment(a, b) for a, b in pairs.few(role)]) for role in ("q", "k"))
    total = queries.unflatten(0, (heads.key_value, -1)).sum(1) + keys  # (G, r/2)
    if heads.rotary == "signs":
        total = torch.complex(total.real, torch.zeros_like(total.real))
    return torch.where(total == 0, 1, total / total.abs())
