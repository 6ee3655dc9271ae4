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
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

from ..discover import plugins
from ..errors import SolverError, nearest
from ..ot.coupling import Coupling, TransportMap
from ..ot.problem import OTProblem, SolverOptions

if TYPE_CHECKING:
    from torch import Tensor

RESIDUAL = "residual"


class RoleSpec(Protocol):
    """What is read of a tensor's description; `architecture.TensorSpec` is one."""

    role: str
    in_space: str | None
    out_space: str | None
    follows: str | None


@dataclass(frozen=True)
class FlowOptions:
    """How to align and fuse.

    Attributes:
        align: False: identity plans, the fusion is a plain average.
        plan_scale: "barycentric": apply n·T, rows are weighted means; "coupling": apply T, as the published script.
        cost, unit_rows, cost_scale: See `ot.costs.cost_matrix`.
        solver: A module of ``ot/solvers``.
        reg: Regularisation in units of the (scaled) cost, or "auto" for ``target_support`` rows a column.
        max_iterations, tolerance, target_support: See `OTSolver.solve`.
        restore_norm: "row" or "tensor": scale fused 2-D weights back to the mean norm of their parents.
        t: W_N = (1-t) W_A + t W_B; several values make several layers from one set of plans.
        zero: Roles that will be zeros: they are not fused, and not even read where no other role needs their plan.
        output_scale: Factor of what writes to the residual stream and is not zero.
        compute_dtype: "float32" or "float64".
    """

    align: bool = True
    plan_scale: Literal["barycentric", "coupling"] = "barycentric"
    cost: str = "euclidean"
    unit_rows: bool = False
    cost_scale: str = "none"
    solver: str = "sinkhorn"
    reg: float | Literal["auto"] = 0.06
    max_iterations: int = 10_000
    tolerance: float = 1e-4
    target_support: float = 2.0
    restore_norm: Literal["none", "row", "tensor"] = "none"
    t: float | Sequence[float] = 0.5
    zero: frozenset[str] = frozenset({"o", "down"})
    output_scale: float = 1.0
    compute_dtype: Literal["float32", "float64"] = "float32"

    def __post_init__(self) -> None:
        choices = {
            "plan_scale": ("barycentric", "coupling"),
            "restore_norm": ("none", "row", "tensor"),
            "compute_dtype": ("float32", "float64"),
            "solver": tuple(plugins("deus_merge.ot.solvers", "SOLVER")),
        }
        for key, known in choices.items():
            got = getattr(self, key)
            if got not in known:
                raise SolverError(f"unknown {key}", expected=" | ".join(known), got=got, hint=nearest(got, known))

    @property
    def ts(self) -> tuple[float, ...]:
        """The t of each new layer."""
        return tuple(self.t) if isinstance(self.t, Sequence) else (self.t,)


@dataclass(frozen=True)
class RoleDiagnostics:
    """How one role's plan came about; the fields are those of `OTSolution`."""

    role: str
    solver: str
    iterations: int
    marginal_error: float
    transport_cost: float
    reg: float | None
    effective_support: float
    converged: bool
    seconds: float


class Fused(NamedTuple):
    """One finished role.

    Attributes:
        role: Which.
        tensors: One a value of t, in the compute dtype; empty for a role of zeros.
        diagnostics: Of its plan; None if it has none of its own.
    """

    role: str
    tensors: tuple[Tensor, ...]
    diagnostics: RoleDiagnostics | None


def fuse_layer(
    a: Mapping[str, Tensor], b: Mapping[str, Tensor], specs: Sequence[RoleSpec], options: FlowOptions
) -> Iterator[Fused]:
    """Align layer A to layer B role by role and fuse them.

    Args:
        a, b: role -> tensor in its stored dtype. Each is looked up at most once, in the order of ``specs``, so a lazy
            mapping may read here and memory holds about one role: two weights, cost, kernel, and the flow's plan.
        specs: The roles that are present, in forward order.
        options: See there.

    Yields:
        One `Fused` a role, in the order of ``specs``.

    Raises:
        SolverError: the roles' shapes do not fit each other, or a solver refuses.

    Reference:
        OpT-DeUS, arXiv 2508.08011, equations of section 3 and algorithm 1.
    """
    needed = _plans_needed(specs, options.zero) if options.align else frozenset()
    walk = _Walk(a, b, options, needed, _followed(specs, options.zero))
    for spec in specs:
        yield walk.step(spec)


@dataclass
class _Walk:
    """The walk through one layer: the plans that later roles still need."""

    a: Mapping[str, Tensor]
    b: Mapping[str, Tensor]
    options: FlowOptions
    needed: frozenset[str]
    followed: frozenset[str]
    flow: TransportMap | Coupling | None = None
    plans: dict[str, TransportMap | Coupling] = field(default_factory=dict)
    writers: set[str] = field(default_factory=set)

    def step(self, spec: RoleSpec) -> Fused:
        role, zero = spec.role, spec.role in self.options.zero
        if (spec.in_space is not None and spec.out_space == RESIDUAL) or spec.follows in self.writers:
            self.writers.add(role)
        if zero and role not in self.needed:
            return Fused(role, (), None)
        wa, wb = self._read(self.a, role), self._read(self.b, role)
        if wa.shape[1:] != wb.shape[1:] or (role not in self.needed and wa.shape != wb.shape):
            raise SolverError("layers do not fit", where=role, expected=tuple(wa.shape), got=tuple(wb.shape))
        if spec.in_space is None:
            return Fused(role, self._mix(role, self._move_vector(wa, spec), wb, None), None)
        if role not in self.needed:
            return Fused(role, self._mix(role, wa, wb, self._norms(wa, wb, None)), None)
        moved = wa
        if self.flow is not None and spec.in_space == RESIDUAL:
            moved = push_columns(self.flow, wa, self.options.plan_scale)  # W_A T_in
        coupling, diagnostics = _solve(role, moved, wb, self.options)
        plan = coupling.transport_map() if self.options.plan_scale == "barycentric" else coupling
        if role in self.followed:
            self.plans[role] = plan
        if spec.out_space == RESIDUAL:
            self.flow = plan
        if zero:
            return Fused(role, (), diagnostics)
        norms = self._norms(wa, wb, coupling)
        del wa
        moved = push_rows(plan, moved, self.options.plan_scale)  # T_outᵀ W_A
        return Fused(role, self._mix(role, moved, wb, norms), diagnostics)

    def _read(self, layer: Mapping[str, Tensor], role: str) -> Tensor:
        import torch

        tensor = layer[role]
        if tensor.ndim > 2:
            raise SolverError(
                "transport_flow aligns vectors and matrices",
                where=role,
                got=f"shape {tuple(tensor.shape)}",
                hint="presets that copy a layer (copy_next, llama_pro) take such tensors",
            )
        return tensor.to(getattr(torch, self.options.compute_dtype))

    def _move_vector(self, vector: Tensor, spec: RoleSpec) -> Tensor:
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

    def _norms(self, wa: Tensor, wb: Tensor, coupling: Coupling | None) -> tuple[Tensor, Tensor] | None:
        """The norms of the parents, (m, 1) each for "row" and () for "tensor"; A's are those before the flow."""
        if self.options.restore_norm == "none":
            return None
        if self.options.restore_norm == "tensor":
            return wa.norm(), wb.norm()
        rows = wa.norm(dim=1, keepdim=True)  # (n, 1)
        if coupling is not None:
            rows = coupling.transport_map().to_rows(rows)  # (m, 1), a weighted mean under either plan_scale
        return rows, wb.norm(dim=1, keepdim=True)

    def _mix(self, role: str, wa: Tensor, wb: Tensor, norms: tuple[Tensor, Tensor] | None) -> tuple[Tensor, ...]:
        mixed = []
        for t in self.options.ts:
            fused = (wa * (1 - t)).add_(wb, alpha=t)
            if norms is not None:
                goal = (1 - t) * norms[0] + t * norms[1]
                now = fused.norm(dim=1, keepdim=True) if goal.ndim else fused.norm()
                fused.mul_((goal / now).where(now > 0, 1))
            if role in self.writers and self.options.output_scale != 1:
                fused.mul_(self.options.output_scale)
            mixed.append(fused)
        return tuple(mixed)


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


def _solve(role: str, wa: Tensor, wb: Tensor, options: FlowOptions) -> tuple[Coupling, RoleDiagnostics]:
    """The plan between the rows of A and B; the cost lives only in here."""
    from ..ot.costs import PointCost

    solver = plugins("deus_merge.ot.solvers", "SOLVER")[options.solver]
    try:
        cost = PointCost(
            wa,
            wb,
            cost=options.cost,
            unit=options.unit_rows,
            cost_scale=options.cost_scale,
            keep_points=solver.needs_points,
        )
        solution = solver.solve(
            OTProblem.uniform(cost),
            SolverOptions(options.reg, options.max_iterations, options.tolerance, options.target_support),
        )
    except SolverError as error:
        error.where = error.where or role
        raise
    told = {key: getattr(solution, key) for key in RoleDiagnostics.__dataclass_fields__ if hasattr(solution, key)}
    return solution.coupling, RoleDiagnostics(role=role, solver=options.solver, **told)


def _plans_needed(specs: Sequence[RoleSpec], zero: frozenset[str]) -> frozenset[str]:
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


def _followed(specs: Sequence[RoleSpec], zero: frozenset[str]) -> frozenset[str]:
    return frozenset(spec.follows for spec in specs if spec.follows is not None and spec.role not in zero)
