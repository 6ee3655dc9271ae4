"""What alignments say of themselves: the statistics that manifest and report hold."""

from __future__ import annotations

from dataclasses import dataclass

from ..core.tensors import Diagnostics
from ..ot.problem import OTSolution


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


@dataclass(frozen=True, kw_only=True)
class HeadDiagnostics(Diagnostics):
    """Which of A's heads replace which of B's, and how similar the matched ones are (1 is the same function).

    Attributes:
        groups: A's key-value group in place of each of B's.
        queries: A's query head in place of each of B's.
        value_cosine, query_key_cosine: Mean over query heads, of the value and the query-key path.
        value_cosine_before, query_key_cosine_before: Those of heads that have the same number, before the alignment.
        fused: How many groups are fused.
    """

    groups: tuple[int, ...]
    queries: tuple[int, ...]
    value_cosine: float
    query_key_cosine: float
    value_cosine_before: float
    query_key_cosine_before: float
    fused: int
