"""The parts that alignments share: reading a role, a plan between rows of two matrices, choosing matches, mixing."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..core.errors import SolverError
from ..core.tensors import Diagnostics, OutputChunk
from ..ot.problem import OTProblem, OTSolution
from .options import AlignOptions

if TYPE_CHECKING:
    from torch import Tensor

    from ..ot.coupling import Coupling


@dataclass(frozen=True, kw_only=True)
class PlanDiagnostics(Diagnostics):
    """Statistics of one plan, and how similar it makes the two sides; the solver's fields are those of `OTSolution`.

    Attributes:
        cosine: Mean cosine between the matched rows of A, moved to B's order, and those of B, before the fusion.
        cosine_before: That of the same rows of B and the rows of A that have their numbers: as stored, before any
            alignment. None where A has another number of rows.
        fused: How many rows (neurons) are fused; fewer than all of them under ``match: partial``, or where a plan with
            relaxed marginals left rows of B unmatched.
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
    cosine_before: float | None = None
    fused: int | None = None

    @classmethod
    def of(cls, role: str, solver: str, solution: OTSolution) -> PlanDiagnostics:
        """The statistics of a solution."""
        return cls(
            role=role,
            solver=solver,
            iterations=solution.iterations,
            marginal_error=solution.marginal_error,
            transport_cost=solution.transport_cost,
            reg=solution.reg,
            effective_support=solution.effective_support,
            converged=solution.converged,
            seconds=solution.seconds,
            gap=solution.gap,
        )


def chunks(role: str, tensors: Sequence[Tensor], diagnostics: Diagnostics | None = None) -> Iterator[OutputChunk]:
    """One finished role: a chunk for each value of t, in the compute dtype. The first one carries the diagnostics; for
    a role of zeros this is the only chunk."""
    if not tensors and diagnostics is not None:
        yield OutputChunk(role, None, diagnostics=diagnostics)
    for slot, tensor in enumerate(tensors):
        yield OutputChunk(role, tensor, slot, diagnostics=diagnostics if slot == 0 else None)


#: bytes; where torch itself puts tensors
_ALIGNMENT = 64


def read(layer: Mapping[str, Tensor], role: str, options: AlignOptions) -> Tensor:
    """One role in the compute dtype, at an aligned address: matrix products of a tensor that begins elsewhere, as it
    may in a mapped file, round otherwise.

    Raises:
        SolverError: it has more than two axes.
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
    return tensor.clone() if tensor.data_ptr() % _ALIGNMENT else tensor


def check_finite(flags: Iterable[tuple[str, Tensor]]) -> None:
    """Check tensors with one read from the device.

    Args:
        flags: The role of each and its `core.units.all_finite`, ().

    Raises:
        SolverError: naming the first role that holds NaN or infinity.
    """
    import torch

    if not (found := list(flags)):
        return
    for (role, _), finite in zip(found, torch.stack([flag for _, flag in found]).tolist(), strict=True):
        if not finite:
            raise SolverError(
                "the weights are not finite", where=role, got="NaN or infinity", hint="correct the checkpoint"
            )


def check_fit(role: str, wa: Tensor, wb: Tensor) -> None:
    """Raise a SolverError unless both are of one shape."""
    if wa.shape != wb.shape:
        raise SolverError("layers do not fit", where=role, expected=tuple(wa.shape), got=tuple(wb.shape))


def plan_between(role: str, x: Tensor, y: Tensor, options: AlignOptions) -> tuple[Coupling, PlanDiagnostics]:
    """The plan between the rows of A, (n, d), and of B, (m, d). The cost is freed on return."""
    from ..ot.costs import PointCost

    solver = options.chosen_solver
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
    return solution.coupling, PlanDiagnostics.of(role, solver.name, solution)


def cosines(x: Tensor, y: Tensor) -> Tensor:
    """Cosine of each row of A with the same row of B, 0 where a row is zero: (n, d), (n, d) -> (n,)."""
    norms = x.norm(dim=1) * y.norm(dim=1)  # (n,)
    dots = (x.unsqueeze(1) @ y.unsqueeze(2)).flatten()  # (n,)
    return dots / norms.where(norms > 0, 1)


@dataclass(frozen=True, eq=False)
class Choice:
    """Which rows (neurons, groups) of N are fused; B's own are used for the others.

    Attributes:
        chosen: (n,) bool; None for all of them.
        cosine: Mean score of the matched ones.
        before: That of the same ones before the alignment; None where it is not known.
        count: How many are fused.
    """

    chosen: Tensor | None
    cosine: float
    before: float | None
    count: int


def choose(
    scores: Tensor,
    what: str,
    role: str,
    options: AlignOptions,
    unmatched: Tensor | None = None,
    before: Tensor | None = None,
) -> Choice:
    """Choose the rows to fuse: those that match, and under ``match: partial`` the best of them.

    Args:
        scores: (n,) cosines of A's with B's.
        what: Their name in messages.
        role: The place in messages.
        options: ``match``, ``match_fraction`` and ``match_score`` are used.
        unmatched: (n,) bool: those that match nothing; None if all match something.
        before: (n,) cosines before the alignment, which choose nothing; None where they are not known.

    Raises:
        SolverError: no score reaches ``match_score``.
    """
    import torch

    chosen, matched = None, None if unmatched is None else ~unmatched  # (n,)
    compared = scores if matched is None else scores.where(matched, -math.inf)  # (n,)
    if options.match == "partial" and options.match_score is not None:
        chosen = compared >= options.match_score  # (n,)
    elif options.match == "partial":
        count = max(1, math.ceil(options.match_fraction * len(scores) - 1e-9))
        chosen = torch.zeros(len(scores), dtype=torch.bool, device=scores.device)
        chosen[compared.sort(descending=True, stable=True).indices[:count]] = True
    if matched is not None:
        chosen = matched if chosen is None else chosen & matched

    def mean(of: Tensor) -> Tensor:
        """() of those that match something"""
        return of.mean() if matched is None else (of * matched).sum() / matched.sum().clamp_min(1)

    fused = scores.new_full((), len(scores)) if chosen is None else chosen.sum()  # ()
    known = [mean(scores), fused, compared.max(), *([] if before is None else [mean(before)])]
    cosine, count, best, *earlier = torch.stack([t.double() for t in known]).tolist()
    if options.match == "partial" and options.match_score is not None and not count:
        raise SolverError(
            f"no {what} matches well enough: nothing would be fused",
            where=role,
            expected=f"a cosine of at least {options.match_score:g} (match_score)",
            got=f"the best of {len(scores)} has {best:.3g}",
            hint="lower match_score, or choose by match_fraction",
        )
    return Choice(chosen, cosine, earlier[0] if earlier else None, int(count))


def mix(
    wa: Tensor,
    wb: Tensor,
    options: AlignOptions,
    *,
    norm_a: Tensor | None = None,
    fused: Tensor | None = None,
    matched: Tensor | None = None,
    scale: float = 1.0,
) -> tuple[Tensor, ...]:
    """W_N = (1-t) W_A + t W_B for every t, with norms restored; equation 8 of OpT-DeUS.

    Args:
        wa: A's weight after the alignment, (n, d) or (n,). Not written to.
        wb: B's, of the same shape.
        norm_a: A's norms in B's order, (n, 1) for ``restore_norm: row``; by default those of ``wa``.
        fused: A bool mask that broadcasts to the weight: B's own values are used where it is false.
        matched: Another one: norms are those of the part of the weight where it is true, and so is ``norm_a``. It is
            false where nothing of A matches, which ``fused`` must exclude.
        scale: Factor of the result.
    """
    norms, per_row = None, options.restore_norm == "row"
    if wa.ndim == 2 and options.restore_norm != "none":
        norm_a = _norm(wa, per_row, matched) if norm_a is None else norm_a
        norms = norm_a, _norm(wb, per_row, matched)
    mixed = []
    for t in options.ts:
        new = (wa * (1 - t)).add_(wb, alpha=t)
        if norms is not None:
            goal, now = (1 - t) * norms[0] + t * norms[1], _norm(new, per_row, matched)
            new.mul_((goal / now).where(now > 0, 1))
        if fused is not None:
            new = new.where(fused, wb)
        mixed.append(new.mul_(scale) if scale != 1 else new)
    return tuple(mixed)


def along(mask: Tensor | None, weight: Tensor, axis: int) -> Tensor | None:
    """A mask of the rows (axis 0) or columns (axis 1) of a weight, so that it broadcasts to the weight."""
    return mask.unsqueeze(1) if mask is not None and weight.ndim == 2 and axis == 0 else mask


def both(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    """Where two masks that broadcast are true; None is true everywhere."""
    return other if one is None else one if other is None else one & other


def _norm(weight: Tensor, per_row: bool, matched: Tensor | None) -> Tensor:
    """(n, 1) or ()"""
    weight = weight if matched is None else weight.where(matched, 0)
    return weight.norm(dim=1, keepdim=True) if per_row else weight.norm()
