"""Align A to B only by transforms that do not change the function of A.

The rows of a layer's matrices have no inherent order: neuron r of the MLP is ``silu(gate_r·x)·(up_r·x)·down[:, r]``, so
gate, up and down move together; a query head works with its key-value head (`heads`). The residual stream keeps its
basis, which neighbouring layers share. The steps, each optional:

- ``experts``: a permutation of experts and of their rows in the router, before all other steps (`experts`).
- ``neurons``: one plan between the f neurons, of an MLP or of each pair of experts, applied to the rows of gate and up
  and to the columns of down. Neurons are compared by ``[gate_r ⊙ n2, up_r ⊙ n2, down[:, r]]``, each of the three scaled
  to the same mean norm. With the solver ``assignment`` it is a permutation; with others each neuron is a mixture, which
  changes A's function. Where ``unbalanced`` leaves neurons of B unmatched, the result has B's own.
- ``heads``: a permutation of key-value groups, and of the query heads inside a group.
- ``values``: an orthogonal turn of each group's values. ``rotary``: turns of the rotary pairs of queries and keys.

Steps that would change the function of a layer (`models.family.Family.without`), and those whose roles it lacks, are
left out. The rules depend only on a role's spaces, so no family is named here. Biases and per-head norms are in the
space of the weight they follow.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ..core.errors import SolverError
from ..core.tensors import Diagnostics, OutputChunk
from ..core.units import all_finite
from ..models.spec import RESIDUAL, Heads, TensorSpec
from ..ot.costs import unit_points
from ..ot.coupling import TransportMap
from .diagnostics import HeadDiagnostics, PlanDiagnostics
from .fusion import (
    along,
    both,
    check_finite,
    check_fit,
    choose,
    chunks,
    chunks_of_rows,
    cosines,
    cosines_of,
    finite_as,
    joined,
    mix,
    mix_permuted,
    plan_between,
    read,
    read_stored,
)
from .heads import AttentionAlignment, align_heads
from .held import HeldLayer
from .neurons import Folded, Neurons, mean_size, turned
from .options import AlignOptions

if TYPE_CHECKING:
    from torch import Tensor

    from ..ot.points import Points

_ATTENTION = {"q": "query_heads", "k": "key_heads", "v": "value_heads", "o": RESIDUAL}  # where they write
_ATTENTION_STEPS = frozenset({"heads", "values", "rotary"})
_HEAD_SPACES = {"query_heads", "key_heads", "value_heads", "gate_heads", "head_entries"}


def missing_for_symmetry(specs: Sequence[TensorSpec], steps: frozenset[str], heads: Heads | None) -> str | None:
    """Why layers of these roles cannot be aligned by these steps; None when they can."""
    if not steps & _ATTENTION_STEPS or not _has_attention(specs):
        return None
    if heads is None:
        return "symmetry needs the numbers of attention heads, which config.json lacks"
    return f"symmetry: {heads.mismatch}" if heads.mismatch else None


def fuse(
    a: Mapping[str, Tensor], b: Mapping[str, Tensor], specs: Sequence[TensorSpec], options: AlignOptions
) -> Iterator[OutputChunk]:
    """Align layer A to layer B by the symmetries of its function and fuse them; see `align.fuse_layer`.

    Memory: for the attention its weights in the dtype of the arithmetic, a few times; for the MLP what the solver takes
    and, of the weights that read neurons, a copy as it is stored.

    Raises:
        SolverError: the layers lack roles that the steps need, or the heads do not divide.
    """
    if missing := missing_for_symmetry(specs, options.symmetry, options.heads):
        raise SolverError(missing)
    layer = _Layer(a, b, specs, options)
    for spec in specs:
        yield from layer.step(spec)


@dataclass(frozen=True)
class _Moved:
    """A tensor of A in B's order.

    Attributes:
        weight: Of the shape of B's.
        norm_a: A's norms, where the move changed them.
        fused: (n,) bool: the rows or columns to fuse; None for all of them.
        matched: (n,) bool: those that something of A matches; None if all are.
        axis: 0 for rows, 1 for columns.
    """

    weight: Tensor
    norm_a: Tensor | None = None
    fused: Tensor | None = None
    matched: Tensor | None = None
    axis: int = 0


class _Layer:
    """One pair of layers: the tensors that were read, and the two transforms once they are known."""

    def __init__(
        self, a: Mapping[str, Tensor], b: Mapping[str, Tensor], specs: Sequence[TensorSpec], options: AlignOptions
    ):
        self.a, self.b = HeldLayer(a), HeldLayer(b)
        self.specs, self.options = {s.role: s for s in specs}, options
        self.steps = options.symmetry - (options.heads.without if options.heads else frozenset())
        self.attends = bool(self.steps & _ATTENTION_STEPS) and _has_attention(specs)
        self.attention: AttentionAlignment | None = None
        self.neurons: dict[str, TransportMap] = {}  # by space
        self.fused_groups: Tensor | None = None  # (G,) bool
        self.fused_neurons: dict[str, Tensor | None] = {}  # (f,) bool each

    def step(self, spec: TensorSpec) -> Iterator[OutputChunk]:
        role, options = spec.role, self.options
        diagnostics = None
        space = _neurons_of(spec)
        if self.attention is None and self.attends and _attention_role(spec):
            diagnostics = self._align_attention(role)
        elif space and spec.in_space and space not in self.neurons and "neurons" in self.steps:
            diagnostics = self._align_neurons(role, space)
        if role in options.zero:
            self._drop(spec)
            return chunks(role, (), diagnostics)
        if space in self.neurons and self._fused_by_rows(spec, self.neurons[space]):
            return self._fuse_by_rows(spec, space, diagnostics)
        wa, wb = self._read(self.a, role), self._read(self.b, role)
        self._check_finite()
        check_fit(role, wa, wb)
        self._drop(spec)
        moved = self._move(spec, wa)
        del wa
        scale = options.output_scale if spec.writes_residual else 1.0
        fused, matched = (along(mask, wb, moved.axis) for mask in (moved.fused, moved.matched))
        mixed = mix(moved.weight, wb, options, norm_a=moved.norm_a, fused=fused, matched=matched, scale=scale)
        return chunks(role, mixed, diagnostics)

    def _fused_by_rows(self, spec: TensorSpec, plan: TransportMap) -> bool:
        """Whether some rows of a weight that reads or writes neurons can be fused without the others."""
        matrix = spec.in_space is not None and spec.out_space not in _HEAD_SPACES
        return matrix and plan.permutation is not None and self.options.restore_norm != "tensor"

    def _fuse_by_rows(self, spec: TensorSpec, space: str, diagnostics: Diagnostics | None) -> Iterator[OutputChunk]:
        """A weight that reads or writes permuted neurons, fused some rows at a time."""
        a, b = (self._stored(side, spec.role) for side in (self.a, self.b))
        self._check_finite()
        check_fit(spec.role, a, b)
        self._drop(spec)
        order, fused = self.neurons[space].permutation, self.fused_neurons[space]  # (f,) each
        assert order is not None, "checked by _fused_by_rows"
        scale = self.options.output_scale if spec.writes_residual else 1.0
        runs = mix_permuted(a, b, order, int(spec.in_space == space), self.options, fused, scale)
        if self.options.whole:
            return chunks(spec.role, joined(runs, b.shape), diagnostics)
        return chunks_of_rows(spec.role, runs, diagnostics)

    def _stored(self, side: HeldLayer, role: str) -> Tensor:
        """One role as it is stored; its values in the compute dtype are checked by the next `_check_finite`."""
        tensor = read_stored(side, role)
        if role not in side.checked:
            side.unchecked[role] = finite_as(tensor, self.options.dtype)
        return tensor

    def _read(self, side: HeldLayer, role: str) -> Tensor:
        """One role in the compute dtype; its values are checked by the next `_check_finite`."""
        tensor = read(side, role, self.options)
        if role not in side.checked:
            side.unchecked[role] = all_finite(tensor)
        return tensor

    def _check_finite(self) -> None:
        """Check every tensor that was read for the first time since the last check, with one read from the device."""
        roles = dict.fromkeys((*self.a.unchecked, *self.b.unchecked))
        sides = (self.a, self.b)
        check_finite((role, side.unchecked[role]) for role in roles for side in sides if role in side.unchecked)
        for side in sides:
            side.checked.update(side.unchecked)
            side.unchecked.clear()

    def _move(self, spec: TensorSpec, weight: Tensor) -> _Moved:
        rows = weight if weight.ndim == 2 else weight.unsqueeze(1)  # (n, d), a bias (n, 1)
        space = _neurons_of(spec)
        if space in self.neurons and spec.out_space in _HEAD_SPACES:
            return self._move_both(spec, weight, space)
        if space in self.neurons:
            plan = self.neurons[space]
            fused, unmatched = self.fused_neurons[space], plan.unmatched
            matched, axis = None if unmatched is None else ~unmatched, int(spec.in_space == space)
            moved = plan.to_columns(weight) if axis else plan.to_rows(rows).view_as(weight)
            return _Moved(moved, self._norms(weight, plan, axis), fused, matched, axis)
        return self._move_heads(spec, weight, rows)

    def _move_both(self, spec: TensorSpec, weight: Tensor, space: str) -> _Moved:
        """A weight that makes heads from latent components: its columns in the order of these, its rows by heads."""
        plan = self.neurons[space]
        columns = plan.to_columns(weight)
        moved = self._move_heads(spec, columns, columns)
        own = None if plan.unmatched is None else ~plan.unmatched  # (m,)
        fused = both(along(moved.fused, weight, 0), self.fused_neurons[space])
        return _Moved(moved.weight, None, fused, own, axis=1)

    def _move_heads(self, spec: TensorSpec, weight: Tensor, rows: Tensor) -> _Moved:
        """A tensor of the attention. Everything else stays as it is, the residual stream too."""
        spaces = _spaces(spec)
        if self.attention is None or spec.out_space is None or not set(spaces) & _HEAD_SPACES:
            return _Moved(weight)
        heads = self.attention.heads
        count = heads.query if spec.out_space in ("query_heads", "gate_heads") else heads.key_value
        if spec.follows and count > 1 and len(weight) == heads.size:  # all heads share it
            return _Moved(weight)
        if spec.multiplies:  # no turn that is allowed changes a norm's weight
            return _Moved(self.attention.permute(rows, spec.out_space).view_as(weight))
        moved = self.attention.move(rows, spec.in_space, spec.out_space).view_as(weight)
        axis = int(spec.in_space == "value_heads")
        return _Moved(moved, fused=self._fused_components(moved.shape[axis]), axis=axis)

    def _drop(self, spec: TensorSpec) -> None:
        """Release a matrix after its last use; vectors are small, and later weights may still need them."""
        if spec.in_space:
            self.a.held.pop(spec.role, None)
            self.b.held.pop(spec.role, None)

    def _norms(self, weight: Tensor, plan: TransportMap, axis: int) -> Tensor | None:
        """A's norms, of the part that matches, where a mixing plan would shrink them: (n, 1) or ()."""
        if weight.ndim != 2 or self.options.restore_norm == "none":
            return None
        per_row = self.options.restore_norm == "row"
        rows = weight.norm(dim=1, keepdim=True)  # (n, 1)
        if axis == 0 and per_row:
            return plan.to_rows(rows)
        if plan.unmatched is None:
            return rows if per_row else weight.norm()
        squares = plan.to_columns(weight.square()) if axis else plan.to_rows(rows.square())  # (d, n) or (n, 1)
        return squares.sum(1, keepdim=True).sqrt() if per_row else squares.sum().sqrt()

    def _fused_components(self, size: int) -> Tensor | None:
        """The groups to fuse as a mask of the components of their heads, (size,)."""
        if self.fused_groups is None:
            return None
        return self.fused_groups.repeat_interleave(size // len(self.fused_groups))

    # attention ---------------------------------------------------------------------------------------------------

    def _align_attention(self, role: str) -> HeadDiagnostics:
        roles = {name: self._role(name) for name in _ATTENTION}
        sides = [
            {name: self._folded(side, r)[:] if name != "o" else self._read(side, r) for name, r in roles.items()}
            for side in (self.a, self.b)
        ]
        self._check_finite()
        for name, r in roles.items():
            check_fit(r, sides[0][name], sides[1][name])
        assert self.options.heads is not None, "checked by missing_for_symmetry"
        found = align_heads(sides[0], sides[1], self.options.heads, self.steps)
        self.attention = found
        choice = choose(found.scores, "key-value group", role, self.options)
        self.fused_groups = choice.chosen
        return HeadDiagnostics(
            role=role,
            groups=found.groups,
            queries=found.queries,
            value_cosine=found.value_cosine,
            query_key_cosine=found.query_key_cosine,
            value_cosine_before=found.value_cosine_before,
            query_key_cosine_before=found.query_key_cosine_before,
            fused=choice.count,
        )

    def _role(self, name: str) -> str:
        return next(s.role for s in self.specs.values() if _attention_role(s) == name)

    def _folded(self, side: HeldLayer, role: str) -> Folded:
        """A weight as it acts on the normed input: input norm and per-head norm folded in, bias as a last column."""
        weight, norm = self._stored(side, role), self.specs[role].norm  # (n, d)
        follows: list[Tensor] = []
        for spec in self.specs.values():
            if spec.follows == role:
                vector = self._read(side, spec.role)
                if len(weight) % len(vector) == 0 and spec.multiplies:
                    vector = vector + spec.offset
                    follows.append(vector.repeat(len(weight) // len(vector)).unsqueeze(1))
                elif len(weight) == len(vector):
                    follows.append(vector)
        factor = self.specs[norm].offset + self._read(side, norm) if norm in self.specs else None  # (d,)
        plan = self.neurons.get(self.specs[role].in_space or "") if side is self.a else None
        return Folded(weight, self.options.dtype, factor, plan, follows)

    # neurons -----------------------------------------------------------------------------------------------------

    def _align_neurons(self, role: str, space: str) -> PlanDiagnostics:
        x, y = self._neurons(space)  # (f, e) each
        coupling, diagnostics = plan_between(role, x, y, replace(self.options, unit_rows=False))
        plan = self.neurons[space] = coupling.transport_map()
        scores = cosines_of(plan.row_blocks(x), y)  # (f,)
        choice = choose(scores, "neuron", role, self.options, before=cosines(x, y), unmatched=plan.unmatched)
        self.fused_neurons[space] = choice.chosen
        return replace(diagnostics, cosine=choice.cosine, cosine_before=choice.before, fused=choice.count)

    def _neurons(self, space: str) -> tuple[Points, Points]:
        """A's and B's neurons, one a row: every weight that writes or reads them, scaled to the same mean norm."""
        sides: tuple[list[Folded], list[Folded]] = [], []
        for spec in self.specs.values():
            if not spec.in_space or space not in _spaces(spec) or _makes_heads(spec, space):
                continue
            pair = []
            for side in (self.a, self.b):
                if spec.in_space == space:
                    pair.append(Folded(turned(self._stored(side, spec.role)), self.options.dtype))
                else:
                    pair.append(self._folded(side, spec.role))
            check_fit(spec.role, *pair)
            size = mean_size(*pair)
            for whole, weight in zip(sides, pair, strict=True):
                whole.append(weight.over(size))
        self._check_finite()
        x, y = map(Neurons, sides)
        return (unit_points(x), unit_points(y)) if self.options.unit_rows else (x, y)


def _spaces(spec: TensorSpec) -> tuple[str | None, str | None]:
    return spec.in_space, spec.out_space


def _neurons_of(spec: TensorSpec) -> str | None:
    """The space of the neurons that a tensor reads or writes."""
    return next((space for space in _spaces(spec) if space and space.startswith("neurons")), None)


def _makes_heads(spec: TensorSpec, space: str) -> bool:
    """Whether a weight makes heads of the neurons of a space. The order of its rows is not known before the order of
    the neurons, which are compared without it."""
    return spec.in_space == space and spec.out_space in _HEAD_SPACES


def _attention_role(spec: TensorSpec) -> str | None:
    """q, k, v or o, whatever it reads; None for all others."""
    if spec.in_space is None or (spec.out_space == RESIDUAL) != (spec.in_space == "value_heads"):
        return None
    return next((name for name, space in _ATTENTION.items() if space == spec.out_space), None)


def _has_attention(specs: Sequence[TensorSpec]) -> bool:
    """Whether q, k, v and o are there."""
    return set(_ATTENTION) <= {_attention_role(spec) for spec in specs}
