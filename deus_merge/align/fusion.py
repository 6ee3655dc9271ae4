"""The parts that alignments share: reading a role, a plan between rows of two matrices, choosing matches, mixing."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..core.errors import SolverError
from ..core.tensors import Diagnostics, OutputChunk
from ..core.units import all_finite
from ..ot.blocks import row_blocks
from ..ot.points import dense, parts, row_norms
from ..ot.problem import OTProblem
from .diagnostics import PlanDiagnostics
from .options import AlignOptions

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ..ot.coupling import Coupling
    from ..ot.points import Points


#: bytes of points that are made once, where there is room; more are made again whenever they are needed
HELD_POINTS = 1 << 32
#: elements of a weight that are fused at once
_FUSED = 1 << 22


def chunks(role: str, tensors: Sequence[Tensor], diagnostics: Diagnostics | None = None) -> Iterator[OutputChunk]:
    """One finished role: a chunk for each value of t, in the compute dtype. The first one carries the diagnostics; for
    a role of zeros this is the only chunk."""
    if not tensors and diagnostics is not None:
        yield OutputChunk(role, None, diagnostics=diagnostics)
    for slot, tensor in enumerate(tensors):
        yield OutputChunk(role, tensor, slot, diagnostics=diagnostics if slot == 0 else None)


def chunks_of_rows(
    role: str, runs: Iterable[tuple[slice, Sequence[Tensor]]], diagnostics: Diagnostics | None
) -> Iterator[OutputChunk]:
    """One role as runs of rows: for each its place, and a tensor (r, d) for each value of t."""
    for rows, tensors in runs:
        for slot, tensor in enumerate(tensors):
            yield OutputChunk(role, tensor, slot, rows.start * tensor.shape[1], diagnostics)
            diagnostics = None


def joined(runs: Iterable[tuple[slice, Sequence[Tensor]]], shape: Sequence[int]) -> list[Tensor]:
    """Runs of rows as tensors of a shape, one for each value of t."""
    wholes: list[Tensor] = []
    for rows, tensors in runs:
        wholes = wholes or [tensor.new_empty(shape) for tensor in tensors]
        for whole, some in zip(wholes, tensors, strict=True):
            whole[rows] = some
    return wholes


#: bytes; where torch itself puts tensors
_ALIGNMENT = 64


def read(layer: Mapping[str, Tensor], role: str, options: AlignOptions) -> Tensor:
    """One role in the compute dtype, at an aligned address: matrix products of a tensor that begins elsewhere, as it
    may in a mapped file, round otherwise.

    Raises:
        SolverError: it has more than two axes.
    """
    tensor = read_stored(layer, role).to(options.dtype)
    return tensor.clone() if tensor.data_ptr() % _ALIGNMENT else tensor


def read_stored(layer: Mapping[str, Tensor], role: str) -> Tensor:
    """One role in its stored dtype.

    Raises:
        SolverError: it has more than two axes.
    """
    tensor = layer[role]
    if tensor.ndim > 2:
        raise SolverError(
            "only vectors and matrices can be aligned",
            where=role,
            got=f"shape {tuple(tensor.shape)}",
            hint="presets that copy a layer (copy_next, llama_pro) take such tensors",
        )
    return tensor


def finite_as(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """`core.units.all_finite` of a stored tensor in another dtype, (), some of it at a time."""
    import torch

    if not tensor.is_floating_point() or torch.finfo(tensor.dtype).max <= torch.finfo(dtype).max:
        return all_finite(tensor)
    flat = tensor.reshape(-1)
    return torch.stack([all_finite(flat[part].to(dtype)) for part in row_blocks(len(flat), 1)]).all()


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


def plan_between(role: str, x: Points, y: Points, options: AlignOptions) -> tuple[Coupling, PlanDiagnostics]:
    """The plan between the rows of A, (n, d), and of B, (m, d). The cost is freed on return."""
    from ..ot.costs import PointCost

    solver, settings = options.chosen_solver, options.solver_options
    points, entries = (options.dtype.itemsize * n for n in (x.shape[1] * (len(x) + len(y)), len(x) * len(y)))
    if not solver.lazy_points:
        x, y = dense(x), dense(y)
    elif points <= HELD_POINTS and (less := settings.with_room(points, beside=entries)):
        x, y, settings = dense(x), dense(y), less  # the same numbers, read faster; a cost needs the room more
    try:
        cost = PointCost(
            x,
            y,
            cost=options.cost,
            unit=options.unit_rows,
            cost_scale=options.cost_scale,
            keep_points=solver.needs_points,
        )
        solution = solver.solve(OTProblem.uniform(cost), settings)
    except SolverError as error:
        error.where = error.where or role
        raise
    return solution.coupling, PlanDiagnostics.of(role, solver.name, solution)


def cosines(x: Points, y: Points) -> Tensor:
    """Cosine of each row of A with the same row of B, 0 where a row is zero: (n, d), (n, d) -> (n,)."""
    return cosines_of(parts(x), y)


def cosines_of(x: Iterable[tuple[slice, Tensor]], y: Points) -> Tensor:
    """`cosines` of rows that are given some at a time."""
    import torch

    found = torch.empty(len(y), dtype=y.dtype, device=y.device)  # (n,)
    for part, rows in x:
        other = y[part]  # (r, d)
        norms = row_norms(rows) * row_norms(other)  # (r,)
        dots = (rows.unsqueeze(1) @ other.unsqueeze(2)).flatten()  # (r,)
        found[part] = dots / norms.where(norms > 0, 1)
    return found


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


def mix_permuted(
    a: Tensor, b: Tensor, order: Tensor, axis: int, options: AlignOptions, fused: Tensor | None, scale: float
) -> Iterator[tuple[slice, tuple[Tensor, ...]]]:
    """`mix` where A's rows or columns only change places, some rows at a time; restores norms of rows, or none.

    Args:
        a, b: The weights as they are stored, (n, d).
        order: The row (axis 0) or column (axis 1) of A in place of each of B's.
        fused: A bool mask of B's rows or columns.
        scale: Factor of the result.
    """
    for rows in row_blocks(*b.shape, elements=_FUSED):
        norm_a, mask = None, fused
        if axis:
            moved = a[rows].to(options.dtype)
            norm_a = row_norms(moved).unsqueeze(1)  # as they are stored: sums of reordered columns round otherwise
            moved = moved.index_select(1, order)
        else:
            moved = a[order[rows]].to(options.dtype)
            mask = None if fused is None else fused[rows]
        wb = b[rows].to(options.dtype)
        yield rows, mix(moved, wb, options, norm_a=norm_a, fused=along(mask, wb, axis), scale=scale)


def along(mask: Tensor | None, weight: Tensor, axis: int) -> Tensor | None:
    """A mask of the rows (axis 0) or columns (axis 1) of a weight, so that it broadcasts to the weight."""
    return mask.unsqueeze(1) if mask is not None and weight.ndim == 2 and axis == 0 else mask


def both(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    """Where two masks that broadcast are true; None is true everywhere."""
    return other if one is None else one if other is None else one & other


def _norm(weight: Tensor, per_row: bool, matched: Tensor | None) -> Tensor:
    """(n, 1) or ()"""
    weight = weight if matched is None else weight.where(matched, 0)
    return row_norms(weight).unsqueeze(1) if per_row else weight.norm()
