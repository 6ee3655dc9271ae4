"""How to align and fuse: one frozen value that every alignment takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from ..core.errors import SolverError, nearest
from ..core.plugins import plugins
from ..models.family import Heads
from ..ot.problem import SolverOptions

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
    "none": ("as it stands", "baseline"),
}
#: The steps of ``symmetry``, in the order they are taken.
STEPS = ("neurons", "heads", "values", "rotary")


@dataclass(frozen=True)
class AlignOptions:
    """How to align layer A to layer B and to fuse the two.

    Attributes:
        alignment: One of `ALIGNMENTS`; ``none`` is a plain average.
        symmetry: Which `STEPS` the alignment ``symmetry`` takes.
        heads: The attention heads of the model; ``symmetry`` needs them.
        plan_scale: ``barycentric``: apply n·T, rows are weighted means; ``coupling``: apply T, as the published script.
        cost, unit_rows, cost_scale: See `ot.costs.PointCost`.
        solver: A module of ``ot/solvers``; ``auto`` is ``assignment`` for symmetry and ``sinkhorn`` for transport_flow.
        solver_options: See there.
        match: ``partial``: fuse only the rows (symmetry: neurons, key-value groups) that match best, keep B's others.
        match_fraction: Of them, the share to fuse, above 0 and at most 1.
        match_score: Instead of a share: fuse those whose cosine with their match is at least this.
        restore_norm: ``row`` or ``tensor``: scale fused 2-D weights back to the mean norm of their parents.
        t: W_N = (1-t) W_A + t W_B; several values make several layers from one set of plans.
        zero: Roles that will be zeros: not fused, and not even read where no plan depends on them.
        output_scale: Factor of what writes to the residual stream and is not zero.
        compute_dtype: ``float32`` or ``float64``.
    """

    alignment: str = "transport_flow"
    symmetry: frozenset[str] = frozenset(STEPS)
    heads: Heads | None = None
    plan_scale: Literal["barycentric", "coupling"] = "barycentric"
    cost: str = "euclidean"
    unit_rows: bool = False
    cost_scale: str = "none"
    solver: str = "auto"
    solver_options: SolverOptions = field(default_factory=SolverOptions)
    match: Literal["full", "partial"] = "full"
    match_fraction: float = 0.25
    match_score: float | None = None
    restore_norm: Literal["none", "row", "tensor"] = "none"
    t: float | Sequence[float] = 0.5
    zero: frozenset[str] = frozenset({"o", "down"})
    output_scale: float = 1.0
    compute_dtype: Literal["float32", "float64"] = "float32"

    def __post_init__(self) -> None:
        choices = {
            "alignment": tuple(ALIGNMENTS),
            "plan_scale": ("barycentric", "coupling"),
            "match": ("full", "partial"),
            "restore_norm": ("none", "row", "tensor"),
            "compute_dtype": ("float32", "float64"),
            "solver": ("auto", *plugins("deus_merge.ot.solvers", "SOLVER")),
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
    def solver_name(self) -> str:
        """The solver that ``auto`` stands for."""
        if self.solver != "auto":
            return self.solver
        return "assignment" if self.alignment == "symmetry" else "sinkhorn"


def _check(key: str, got: str, known: Sequence[str]) -> None:
    if got not in known:
        raise SolverError(f"unknown {key}", expected=" | ".join(known), got=got, hint=nearest(got, known))
