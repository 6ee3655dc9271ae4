"""The paper's alignment: every matrix of a layer gets a transport plan, and plans flow along the residual stream.

Each 2-D weight of layer A is moved to the row order of the same weight of layer B by its own plan, after its input
side was moved by the plan of the last block that wrote to the residual stream (OpT-DeUS, arXiv 2508.08011, section 3).

The rules depend only on a role's spaces, so no family is named here:

- 2-D, reads the residual stream: columns are moved by the *flow*, the out-plan of the last residual writer before the
  norm that it reads (before itself, where it reads none) in this layer; identity before the first. Writers in parallel
  so do not see each other. Then rows are moved by its own plan; those of a router stay, its experts are matched before.
- 2-D, reads another space: no input side.
- 1-D that follows nothing (a norm): ½ (moved by the flow) + ½ itself; before any residual writer, itself.
- 1-D that follows a weight (bias, per-head norm): moved by that weight's plan.

A plan with relaxed marginals may leave rows of B unmatched. The new layer has B's own values there: in the rows of the
weight, in the bias that follows it, and, for a plan that flows on, in the columns and norm entries that it moves.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from ..core.errors import SolverError
from ..core.tensors import OutputChunk
from ..core.units import all_finite
from ..models.spec import RESIDUAL, TensorSpec
from ..ot.coupling import Coupling, RowMap, ScriptedMap
from .fusion import (
    along,
    both,
    check_finite,
    check_fit,
    choose,
    chunks,
    cosines,
    mix,
    plan_between,
    read,
)
from .options import AlignOptions

if TYPE_CHECKING:
    from torch import Tensor


def fuse(
    a: Mapping[str, Tensor], b: Mapping[str, Tensor], specs: Sequence[TensorSpec], options: AlignOptions
) -> Iterator[OutputChunk]:
    """Align layer A to layer B role by role and fuse them; see `align.fuse_layer`.

    Memory holds about one role: two weights, cost, kernel, and the flow's plan.

    Reference:
        OpT-DeUS, arXiv 2508.08011, equations of section 3 and algorithm 1.
    """
    flows = _flows(specs)
    needed = _plans_needed(specs, flows, options.zero) if options.alignment != "none" else frozenset()
    walk = _Walk(a, b, options, needed, flows, _last_uses(specs, flows, options.zero))
    for spec in specs:
        yield from walk.step(spec)
        walk.release(spec.role)


@dataclass
class _Walk:
    """The walk through one layer: the plans that later roles still need.

    Attributes:
        a, b: The layers.
        options: How to align and to fuse.
        needed: The weights that need a plan.
        flows: Role -> the writer whose plan moves what it reads.
        last_uses: Weight -> the last role that its plan moves.
        plans: By weight.
        fused: Weight -> rows to fuse, (m,) bool; None: all.
    """

    a: Mapping[str, Tensor]
    b: Mapping[str, Tensor]
    options: AlignOptions
    needed: frozenset[str]
    flows: Mapping[str, str | None]
    last_uses: Mapping[str, str]
    plans: dict[str, RowMap] = field(default_factory=dict)
    fused: dict[str, Tensor | None] = field(default_factory=dict)

    def step(self, spec: TensorSpec) -> Iterator[OutputChunk]:
        role, zero = spec.role, spec.role in self.options.zero
        if zero and role not in self.needed:
            return chunks(role, ())
        wa, wb = read(self.a, role, self.options), read(self.b, role, self.options)
        check_finite([(role, all_finite(wa)), (role, all_finite(wb))])
        if role not in self.needed or wa.shape[1:] != wb.shape[1:]:
            check_fit(role, wa, wb)
        if spec.in_space is None:
            return chunks(role, self._mix_vector(spec, wa, wb))
        flow = self._flow(role)
        moved = wa if flow is None else flow.to_columns(wa)  # W_A T_in
        if role not in self.needed:
            columns = None if flow is None else _matched(flow)  # (d,)
            return chunks(role, mix(moved, wb, self.options, fused=columns, matched=columns, scale=self._scale(spec)))
        coupling, diagnostics = plan_between(role, moved, wb, self.options)
        plan: RowMap = coupling.transport_map() if self.options.plan_scale == "barycentric" else ScriptedMap(coupling)
        if role in self.last_uses:
            self.plans[role] = plan
        if zero:
            self.fused[role] = _matched(plan)
            return chunks(role, (), diagnostics)
        norms = self._norms(wa, flow, plan, coupling)
        before = cosines(wa, wb) if wa.shape == wb.shape else None  # (m,)
        del wa
        moved = plan.to_rows(moved)  # T_outᵀ W_A
        choice = choose(cosines(moved, wb), "row", role, self.options, before=before, unmatched=plan.unmatched)
        self.fused[role] = choice.chosen  # (m,)
        diagnostics = replace(diagnostics, cosine=choice.cosine, cosine_before=choice.before, fused=choice.count)
        columns = None if flow is None else _matched(flow)  # (d,)
        fused = both(along(choice.chosen, wb, 0), columns)  # (m, 1), (d,) or (m, d)
        matched = both(along(_matched(plan), wb, 0), columns)  # likewise
        scale = self._scale(spec)
        return chunks(
            role, mix(moved, wb, self.options, norm_a=norms, fused=fused, matched=matched, scale=scale), diagnostics
        )

    def _mix_vector(self, spec: TensorSpec, va: Tensor, vb: Tensor) -> tuple[Tensor, ...]:
        """A 1-D tensor of A, (n,) or for per-head norms (h,), moved to the order of B and fused."""
        moved, fused = va, None
        if spec.follows is not None and spec.follows in self.plans:
            plan = self.plans[spec.follows]
            heads, rest = divmod(plan.shape[0], len(va))
            if rest:
                raise SolverError(
                    "does not fit the weight it follows", where=spec.role, expected=plan.shape[0], got=len(va)
                )
            tiled = plan.to_rows(va.repeat(heads).unsqueeze(1)).squeeze(1)  # (H·h,), H = 1 for a bias
            if plan.unmatched is not None:
                tiled = vb.repeat(heads).where(plan.unmatched, tiled)
            moved = tiled.view(heads, -1).mean(0)
            fused = self.fused.get(spec.follows) if heads == 1 else None  # per-head norms are always fused
        elif (flow := self._flow(spec.role)) is not None:
            moved = 0.5 * flow.to_rows(va.unsqueeze(1)).squeeze(1) + 0.5 * va
            fused = _matched(flow)  # (d,)
        return mix(moved, vb, self.options, fused=fused, scale=self._scale(spec))

    def _norms(self, wa: Tensor, flow: RowMap | None, plan: RowMap, coupling: Coupling) -> Tensor | None:
        """A's norms before the flow, of the part that matches: (m, 1) in B's order for "row", () for "tensor"."""
        if self.options.restore_norm == "none":
            return None
        columns = None if flow is None else _matched(flow)  # (d,)
        if self.options.restore_norm == "tensor" and columns is None and plan.unmatched is None:
            return wa.norm()
        rows = wa.norm(dim=1, keepdim=True)  # (n, 1)
        if flow is not None and columns is not None:
            rows = flow.to_columns(wa.square()).sum(1, keepdim=True).sqrt()
        means = coupling.transport_map()  # weighted means under either plan_scale
        return means.to_rows(rows) if self.options.restore_norm == "row" else means.to_rows(rows.square()).sum().sqrt()

    def release(self, role: str) -> None:
        """Forget the plans that no role after this one needs."""
        for weight in [w for w, last in self.last_uses.items() if last == role]:
            self.plans.pop(weight, None)

    def _flow(self, role: str) -> RowMap | None:
        writer = self.flows.get(role)
        return None if writer is None else self.plans.get(writer)

    def _scale(self, spec: TensorSpec) -> float:
        return self.options.output_scale if spec.writes_residual else 1.0


def _matched(plan: RowMap) -> Tensor | None:
    """(m,) bool: the rows of B that something of A matches; None if all are."""
    return None if plan.unmatched is None else ~plan.unmatched


def _flows(specs: Sequence[TensorSpec]) -> dict[str, str | None]:
    """For each norm and each weight on the residual stream: the writer whose plan moves what it reads."""
    flows: dict[str, str | None] = {}
    last: str | None = None
    for spec in specs:
        if spec.in_space is None and spec.follows is None and spec.out_space == RESIDUAL:
            flows[spec.role] = last
        elif spec.in_space == RESIDUAL:
            flows[spec.role] = flows.get(spec.norm, last) if spec.norm else last
        if spec.in_space is not None and spec.out_space == RESIDUAL:
            last = spec.role
    return flows


def _plans_needed(specs: Sequence[TensorSpec], flows: Mapping[str, str | None], zero: frozenset[str]) -> frozenset[str]:
    """The weights whose plan changes anything: those fused, those followed, and those whose plan flows on."""
    needed: set[str] = set()
    used = _followed(specs, zero)  # and writers whose plan flows on
    for spec in reversed(specs):
        if spec.in_space is not None and spec.out_space != "experts" and (spec.role not in zero or spec.role in used):
            needed.add(spec.role)
        if (spec.role in needed or spec.role not in zero) and (writer := flows.get(spec.role)):
            used.add(writer)
    return frozenset(needed)


def _last_uses(specs: Sequence[TensorSpec], flows: Mapping[str, str | None], zero: frozenset[str]) -> dict[str, str]:
    """For each weight whose plan moves other roles: the last of these."""
    followed, last = _followed(specs, zero), {}
    for spec in specs:
        for weight in (flows.get(spec.role), spec.follows if spec.follows in followed else None):
            if weight is not None:
                last[weight] = spec.role
    return last


def _followed(specs: Sequence[TensorSpec], zero: frozenset[str]) -> set[str]:
    return {spec.follows for spec in specs if spec.follows is not None and spec.role not in zero}
