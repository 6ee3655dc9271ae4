"""What alignments share: reading a role, a plan between the rows of two matrices, choosing matches, and the mix."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..core.errors import SolverError
from ..core.plugins import plugins
from ..core.tensors import Diagnostics, OutputChunk
from ..ot.problem import OTProblem
from .options import AlignOptions

if TYPE_CHECKING:
    from torch import Tensor

    from ..ot.coupling import Coupling


@dataclass(frozen=True, kw_only=True)
class PlanDiagnostics(Diagnostics):
    """How one plan came about, and how alike it makes the two sides; the solver's fields are those of `OTSolution`.

    Attributes:
        cosine: Mean cosine between what A gives and B, before the fusion.
        fused: How many rows (neurons) are fused; less than all of them only under ``match: partial``.
    """

    solver: str
    iterations: int
    marginal_error: float
    transport_cost: float
    reg: float | None
    effective_support: float
    converged: bool
    seconds: float
    gap: float | None = None
    cosine: float | None = None
    fused: int | None = None


def chunks(role: str, tensors: Sequence[Tensor], diagnostics: Diagnostics | None = None) -> Iterator[OutputChunk]:
    """One finished role: a chunk for each value of t, in the compute dtype. The first one carries the diagnostics; for
    a role of zeros it carries nothing else."""
    if not tensors and diagnostics is not None:
        yield OutputChunk(role, None, diagnostics=diagnostics)
    for slot, tensor in enumerate(tensors):
        yield OutputChunk(role, tensor, slot, diagnostics=diagnostics if slot == 0 else None)


def read(layer: Mapping[str, Tensor], role: str, options: AlignOptions) -> Tensor:
    """One role in the compute dtype.

    Raises:
        SolverError: it has more than two axes, or NaN or infinity in it.
    """
    import torch

    tensor = layer[role]
    if tensor.ndim > 2:
        raise SolverError(
            "only vectors and matrices can be aligned",
            where=role,
            got=f"shape {tuple(tensor.shape)}",
            hint="presets that copy a layer (copy_next, llama_pro) take such tensors",
        )
    tensor = tensor.to(getattr(torch, options.compute_dtype))
    if tensor.numel() and not bool(torch.isfinite(torch.stack(torch.aminmax(tensor))).all()):
        raise SolverError("the weights are not finite", where=role, got="NaN or infinity", hint="mend the checkpoint")
    return tensor


def check_fit(role: str, wa: Tensor, wb: Tensor) -> None:
    """Raise a SolverError unless both are of one shape."""
    if wa.shape != wb.shape:
        raise SolverError("layers do not fit", where=role, expected=tuple(wa.shape), got=tuple(wb.shape))


def plan_between(role: str, x: Tensor, y: Tensor, options: AlignOptions) -> tuple[Coupling, PlanDiagnostics]:
    """The plan between the rows of A, (n, d), and of B, (m, d). The cost lives only in here."""
    from ..ot.costs import PointCost

    solver = plugins("deus_merge.ot.solvers", "SOLVER")[options.solver_name]
    try:
        cost = PointCost(
            x,
            y,
            cost=options.cost,
            unit=options.unit_rows,
            cost_scale=options.cost_scale,
            keep_points=solver.needs_points,
        )
        solution = solver.solve(OTProblem.uniform(cost), options.solver_options)
    except SolverError as error:
        error.where = error.where or role
        raise
    told = {key: getattr(solution, key) for key in PlanDiagnostics.__dataclass_fields__ if hasattr(solution, key)}
    return solution.coupling, PlanDiagnostics(role=role, solver=options.solver_name, **told)


def cosines(x: Tensor, y: Tensor) -> Tensor:
    """Cosine of each row of A with the same row of B, 0 where a row is zero: (n, d), (n, d) -> (n,)."""
    norms = x.norm(dim=1) * y.norm(dim=1)  # (n,)
    dots = (x.unsqueeze(1) @ y.unsqueeze(2)).flatten()  # (n,)
    return dots / norms.where(norms > 0, 1)


def choose(scores: Tensor, what: str, role: str, options: AlignOptions) -> Tensor | None:
    """Which of them to fuse under ``match: partial``, (n,) bool; None for all of them.

    Raises:
        SolverError: no score reaches ``match_score``.
    """
    import torch

    if options.match == "full":
        return None
    if options.match_score is not None:
        chosen = scores >= options.match_score  # (n,)
        if not bool(chosen.any()):
            raise SolverError(
                f"no {what} matches well enough: nothing would be fused",
                where=role,
                expected=f"a cosine of at least {options.match_score:g} (match_score)",
                got=f"the best of {len(scores)} has {scores.max().item():.3g}",
                hint="lower match_score, or choose by match_fraction",
            )
        return chosen
    count = max(1, math.ceil(options.match_fraction * len(scores) - 1e-9))
    chosen = torch.zeros(len(scores), dtype=torch.bool, device=scores.device)
    chosen[scores.sort(descending=True, stable=True).indices[:count]] = True
    return chosen


def mix(
    wa: Tensor,
    wb: Tensor,
    options: AlignOptions,
    *,
    norm_a: Tensor | None = None,
    chosen: Tensor | None = None,
    axis: int = 0,
    scale: float = 1.0,
) -> tuple[Tensor, ...]:
    """W_N = (1-t) W_A + t W_B for every t, with norms restored; equation 8 of OpT-DeUS.

    Args:
        wa: A's weight after the alignment, (n, d) or (n,). Not written to.
        wb: B's, of the same shape.
        norm_a: A's norms in B's order, (n, 1) for ``restore_norm: row``; by default those of ``wa``.
        chosen: (n,) or (d,) bool: B is kept elsewhere.
        axis: Which axis ``chosen`` is about.
        scale: Factor of the result.
    """
    norms = None
    if wa.ndim == 2 and options.restore_norm != "none":
        per_row = options.restore_norm == "row"
        norm_a = _norm(wa, per_row) if norm_a is None else norm_a
        norms = norm_a, _norm(wb, per_row)
    mixed = []
    for t in options.ts:
        fused = (wa * (1 - t)).add_(wb, alpha=t)
        if norms is not None:
            goal, now = (1 - t) * norms[0] + t * norms[1], _norm(fused, per_row)
            fused.mul_((goal / now).where(now > 0, 1))
        if chosen is not None:
            mask = chosen.view(-1, *[1] * (fused.ndim - 1)) if axis == 0 else chosen
            fused = fused.where(mask, wb)
        mixed.append(fused.mul_(scale) if scale != 1 else fused)
    return tuple(mixed)


def _norm(weight: Tensor, per_row: bool) -> Tensor:
    """(n, 1) or ()"""
    return weight.norm(dim=1, keepdim=True) if per_row else weight.norm()
