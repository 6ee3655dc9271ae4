"""How to align and fuse: one frozen value that every alignment takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from ..core.errors import SolverError, nearest
from ..models.spec import Heads
from ..ot.problem import DEFAULT_OPTIONS, SolverOptions
from ..ot.registry import solver
from ..ot.solver import OTSolver

if TYPE_CHECKING:
    import torch

#: The alignments a recipe can name: name -> (summary, reference).
ALIGNMENTS = {
    "symmetry": (
        "neurons and heads permuted, value and rotary spaces turned: A comes close to B and computes what A computes",
        "this project; the idea: Singh and Jaggi, arXiv 1910.05653, and Ainsworth et al., arXiv 2209.04836",
    ),
    "transport_flow": (
        "a transport plan for every matrix by itself, input sides follow the plans of the residual stream",
        "Cao, Wang, Aletras, arXiv 2508.08011",
    ),
    "none": ("A unchanged", "baseline"),
}
#: The steps of ``symmetry``, in their order.
STEPS = ("experts", "neurons", "heads", "values", "rotary")


@dataclass(frozen=True)
class AlignOptions:
    """How to align layer A to layer B and to fuse the two.

    Attributes:
        alignment: One of `ALIGNMENTS`; ``none`` is a plain average.
        symmetry: Which `STEPS` the alignment ``symmetry`` takes.
        heads: The attention heads of the model; ``symmetry`` needs them.
        plan_scale: ``barycentric``: apply n·T, rows are weighted means; ``coupling``: apply T, as the published script.
        cost, unit_rows, cost_scale: See `ot.costs.PointCost`.
        solver: The solver with its own options; None for the default of the alignment (`default_solver`).
        solver_options: The options that all solvers share.
        match: ``partial``: fuse only the rows (symmetry: neurons, key-value groups) that match best, and use B's for
            the others.
        match_fraction: For ``partial``: the share to fuse, above 0 and at most 1.
        match_score: Instead of a share: fuse those whose cosine with their match is at least this.
        restore_norm: ``row`` or ``tensor``: scale fused 2-D weights back to the mean norm of their parents.
        t: W_N = (1-t) W_A + t W_B; several values make several layers from one set of plans.
        zero: Roles that will be zeros: they are not fused, and are read only where a plan depends on them.
        output_scale: Factor of the roles that write to the residual stream and are not zero.
        compute_dtype: ``float32`` or ``float64``.
        whole: Whether every result is a tensor; otherwise large ones may come as runs of rows, in less memory.
    """

    alignment: str = "transport_flow"
    symmetry: frozenset[str] = frozenset(STEPS)
    heads: Heads | None = None
    plan_scale: Literal["barycentric", "coupling"] = "barycentric"
    cost: str = "euclidean"
    unit_rows: bool = False
    cost_scale: str = "none"
    solver: OTSolver | None = None
    solver_options: SolverOptions = DEFAULT_OPTIONS
    match: Literal["full", "partial"] = "full"
    match_fraction: float = 0.25
    match_score: float | None = None
    restore_norm: Literal["none", "row", "tensor"] = "none"
    t: float | Sequence[float] = 0.5
    zero: frozenset[str] = frozenset({"o", "down"})
    output_scale: float = 1.0
    compute_dtype: Literal["float32", "float64"] = "float32"
    whole: bool = True

    def __post_init__(self) -> None:
        choices = {
            "alignment": tuple(ALIGNMENTS),
            "plan_scale": ("barycentric", "coupling"),
            "match": ("full", "partial"),
            "restore_norm": ("none", "row", "tensor"),
            "compute_dtype": ("float32", "float64"),
        }
        for key, known in choices.items():
            _check(key, getattr(self, key), known)
        for step in self.symmetry:
            _check("symmetry", step, STEPS)

    @property
    def ts(self) -> tuple[float, ...]:
        """The t of each new layer."""
        return tuple(self.t) if isinstance(self.t, Sequence) else (self.t,)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the arithmetic."""
        import torch

        return getattr(torch, self.compute_dtype)

    @property
    def chosen_solver(self) -> OTSolver:
        """The solver, or the default one of the alignment."""
        return self.solver or solver(default_solver(self.alignment))


def default_solver(alignment: str) -> str:
    """The name of the solver that an alignment uses unless another one is chosen."""
    return "assignment" if alignment == "symmetry" else "sinkhorn"


def _check(key: str, got: str, known: Sequence[str]) -> None:
    if got not in known:
        raise SolverError(f"unknown {key}", expected=" | ".join(known), got=got, hint=nearest(got, known))
