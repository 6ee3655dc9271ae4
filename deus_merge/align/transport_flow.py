"""The paper's alignment: every matrix of a layer gets a transport plan, and plans flow along the residual stream.

Each 2-D weight of layer A is moved to the row order of the same weight of layer B by its own plan, after its input
side was moved by the plan of the last block that wrote to the residual stream (OpT-DeUS, arXiv 2508.08011, section 3).

What a role does is read from its spaces, so no family is named here:

- 2-D, reads the residual stream: columns are moved by the *flow*, the out-plan of the last residual writer before it
  in this layer (none yet: identity). Then rows are moved by its own plan.
- 2-D, reads another space: no input side.
- 1-D that follows nothing (a norm): ½ (moved by the flow) + ½ itself; before any residual writer, itself.
- 1-D that follows a weight (bias, per-head norm): moved by that weight's plan.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from ..core.errors import SolverError
from ..core.tensors import OutputChunk
from ..models.family import RESIDUAL, TensorSpec
from ..ot.coupling import Coupling, TransportMap
from .fusion import check_fit, choose, chunks, cosines, mix, plan_between, read
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
    needed = _plans_needed(specs, options.zero) if options.alignment != "none" else frozenset()
    walk = _Walk(a, b, options, needed, _followed(specs, options.zero))
    for spec in specs:
        yield from walk.step(spec)


@dataclass
class _Walk:
    """The walk through one layer: the plans that later roles still need."""

    a: Mapping[str, Tensor]
    b: Mapping[str, Tensor]
    options: AlignOptions
    needed: frozenset[str]
    followed: frozenset[str]
    flow: TransportMap | Coupling | None = None
    plans: dict[str, TransportMap | Coupling] = field(default_factory=dict)
    chosen: dict[str, Tensor | None] = field(default_factory=dict)

    def step(self, spec: TensorSpec) -> Iterator[OutputChunk]:
        role, zero = spec.role, spec.role in self.options.zero
        if zero and role not in self.needed:
            return chunks(role, ())
        wa, wb = read(self.a, role, self.options), read(self.b, role, self.options)
        if role not in self.needed or wa.shape[1:] != wb.shape[1:]:
            check_fit(role, wa, wb)
        if spec.in_space is None:
            return chunks(role, self._mix(spec, self._move_vector(wa, spec), wb))
        if role not in self.needed:
            return chunks(role, self._mix(spec, wa, wb))
        moved = wa
        if self.flow is not None and spec.in_space == RESIDUAL:
            moved = push_columns(self.flow, wa, self.options.plan_scale)  # W_A T_in
        coupling, diagnostics = plan_between(role, moved, wb, self.options)
        plan = coupling.transport_map() if self.options.plan_scale == "barycentric" else coupling
        if role in self.followed:
            self.plans[role] = plan
        if spec.out_space == RESIDUAL:
            self.flow = plan
        if zero:
            return chunks(role, (), diagnostics)
        norms = self._norms(wa, coupling)
        del wa
        moved = push_rows(plan, moved, self.options.plan_scale)  # T_outᵀ W_A
        scores = cosines(moved, wb)  # (m,)
        self.chosen[role] = chosen = choose(scores, "row", role, self.options)
        diagnostics = replace(
            diagnostics,
            cosine=scores.mean().item(),
            fused=len(scores) if chosen is None else int(chosen.sum()),
        )
        return chunks(role, self._mix(spec, moved, wb, norms), diagnostics)

    def _move_vector(self, vector: Tensor, spec: TensorSpec) -> Tensor:
        """A 1-D tensor of A in the order of B, (n,) or for per-head norms (h,)."""
        scale = self.options.plan_scale
        if spec.follows in self.plans:
            plan = self.plans[spec.follows]
            rows = plan.shape[0]
            heads, rest = divmod(rows, len(vector))
            if rest:
                raise SolverError("does not fit the weight it follows", where=spec.role, expected=rows, got=len(vector))
            tiled = vector.repeat(heads).unsqueeze(1)  # (H·h, 1), H = 1 for a bias
            return push_rows(plan, tiled, scale).view(heads, -1).mean(0)
        if spec.follows is None and self.flow is not None and spec.out_space == RESIDUAL:
            return 0.5 * push_rows(self.flow, vector.unsqueeze(1), scale).squeeze(1) + 0.5 * vector
        return vector

    def _norms(self, wa: Tensor, coupling: Coupling) -> Tensor | None:
        """A's norms before the flow: (m, 1) in B's order for "row", () for "tensor"."""
        if self.options.restore_norm == "row":  # a weighted mean under either plan_scale
            return coupling.transport_map().to_rows(wa.norm(dim=1, keepdim=True))
        return wa.norm() if self.options.restore_norm == "tensor" else None

    def _mix(self, spec: TensorSpec, wa: Tensor, wb: Tensor, norm_a: Tensor | None = None) -> tuple[Tensor, ...]:
        chosen = self.chosen.get(spec.follows or spec.role)
        scale = self.options.output_scale if spec.writes_residual else 1.0
        fits = chosen is not None and len(chosen) == len(wb)  # a per-head norm is shorter: it is always fused
        return mix(wa, wb, self.options, norm_a=norm_a, chosen=chosen if fits else None, scale=scale)


def push_rows(plan: TransportMap | Coupling, weight: Tensor, plan_scale: str) -> Tensor:
    """A's rows in B's order, (n, d) -> (m, d), under the arithmetic of ``plan_scale``.

    Raises:
        TypeError: the plan is of the other kind.
    """
    if plan_scale == "coupling":
        return _expect(Coupling, plan).scripted_rows(weight)
    return _expect(TransportMap, plan).to_rows(weight)


def push_columns(plan: TransportMap | Coupling, weight: Tensor, plan_scale: str) -> Tensor:
    """A's columns in B's order, (d, n) -> (d, m); see `push_rows`."""
    if plan_scale == "coupling":
        return _expect(Coupling, plan).scripted_columns(weight)
    return _expect(TransportMap, plan).to_columns(weight)


def _expect(kind: type, plan: TransportMap | Coupling) -> TransportMap | Coupling:
    if not isinstance(plan, kind):
        raise TypeError(f"this plan_scale applies a {kind.__name__}, not a {type(plan).__name__}")
    return plan


def _plans_needed(specs: Sequence[TensorSpec], zero: frozenset[str]) -> frozenset[str]:
    """The weights whose plan changes anything: those fused, those followed, and those whose plan flows on."""
    needed: set[str] = set()
    followed = _followed(specs, zero)
    flow_used = False
    for spec in reversed(specs):
        if spec.in_space is None:
            flow_used |= spec.follows is None and spec.out_space == RESIDUAL and spec.role not in zero
            continue
        if spec.role not in zero or spec.role in followed or (spec.out_space == RESIDUAL and flow_used):
            needed.add(spec.role)
        if spec.out_space == RESIDUAL:
            flow_used = False
        flow_used |= spec.role in needed and spec.in_space == RESIDUAL
    return frozenset(needed)


def _followed(specs: Sequence[TensorSpec], zero: frozenset[str]) -> frozenset[str]:
    return frozenset(spec.follows for spec in specs if spec.follows is not None and spec.role not in zero)
