"""What an optimal transport solver takes and gives: `OTProblem` in, `OTSolution` out, `OTSolver` between them."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from ..core.errors import SolverError
from .costs import PointCost
from .coupling import Coupling, product_blocks

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor


@dataclass(frozen=True, eq=False)
class OTProblem:
    """Transport mass ``a`` on n points to mass ``b`` on m points, at ``cost[r, s]`` a unit from r to s.

    Args:
        cost: (n, m), float32 or float64, finite; or the `PointCost` that makes it in row blocks.
        a: (n,) non-negative, sums to 1.
        b: (m,) non-negative, sums to 1.

    Raises:
        SolverError: anything else.
    """

    cost: Tensor | PointCost
    a: Tensor
    b: Tensor

    def __post_init__(self) -> None:
        import torch

        if len(self.cost.shape) != 2 or 0 in self.cost.shape:
            raise SolverError(
                "the cost is not a matrix", expected="(n, m), n and m at least 1", got=tuple(self.cost.shape)
            )
        if self.cost.dtype not in (torch.float32, torch.float64):
            raise SolverError("the cost has the wrong dtype", expected="float32 or float64", got=self.cost.dtype)
        if isinstance(self.cost, torch.Tensor):
            low, high = torch.aminmax(self.cost)  # NaN passes through both
            if not bool(torch.isfinite(low) & torch.isfinite(high)):
                raise SolverError("the cost is not finite", got=f"minimum {low.item()}, maximum {high.item()}")
        for name, marginal, size in (("a", self.a, self.cost.shape[0]), ("b", self.b, self.cost.shape[1])):
            if tuple(marginal.shape) != (size,):
                raise SolverError(f"marginal {name} does not fit the cost", expected=(size,), got=tuple(marginal.shape))
            if not bool(torch.isfinite(marginal).all()) or bool((marginal < 0).any()):
                raise SolverError(f"marginal {name} has negative or non-finite entries")
            total = marginal.double().sum().item()
            if abs(total - 1) > 1e-4:
                raise SolverError(f"marginal {name} is not a distribution", expected="a sum of 1", got=total)

    @classmethod
    def uniform(cls, cost: Tensor | PointCost) -> OTProblem:
        """The problem with uniform marginals 1/n and 1/m."""
        import torch

        n, m = cost.shape if len(cost.shape) == 2 else (1, 1)  # other shapes are refused below
        a, b = (torch.full((k,), 1 / max(k, 1), dtype=cost.dtype, device=cost.device) for k in (n, m))
        return cls(cost, a, b)

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """The cost in row blocks, in order: (rows, (r, m)). Not to be written to; good until the next is asked for."""
        if isinstance(self.cost, PointCost):
            yield from self.cost.blocks()
        else:
            yield from ((block, self.cost[block]) for block in product_blocks(*self.cost.shape))

    def stored(self) -> OTProblem:
        """The same problem with its cost as one matrix."""
        return OTProblem(self.cost.dense(), self.a, self.b) if isinstance(self.cost, PointCost) else self

    def keep(self, nbytes: int | None) -> None:
        """How much of a `PointCost` may stay in memory; a matrix is there already."""
        if isinstance(self.cost, PointCost):
            self.cost.keep(nbytes)

    @property
    def is_uniform_square(self) -> bool:
        """Whether the exact plan can be a permutation divided by n."""
        n, m = self.cost.shape
        return n == m and bool((self.a == self.a[0]).all()) and bool((self.b == self.b[0]).all())


@dataclass(frozen=True)
class SolverOptions:
    """How hard to solve.

    Args:
        reg: Entropic regularisation in units of the cost, or "auto": chosen so that a column's mass comes from
            ``target_support`` rows. Exact solvers ignore both.
        max_iterations: Passes over the kernel at most; exact solvers ignore it.
        tolerance: L1 marginal error, rows plus columns, at which to stop.
        target_support: See ``reg``.
        memory: Bytes that n x m buffers may take; None for as many as are useful. Solvers that can, make such
            buffers again in row blocks instead; the plan is the same bit for bit.
        progot_steps: Stages of ``progot``, at least 1; the points move after every stage but the last.
        progot_schedule: How far the points of ``progot`` have come before each stage; see `solvers.progot`.
        marginal_penalty: The weight rho of KL(T1|a) + KL(Tᵀ1|b) of ``unbalanced``, as a multiple of the problem's mean
            cost Σ a_r b_s |C_rs|: it means the same at any scale of the cost. 1 lets points that cost about the
            mean lose some of their mass; plans keep their marginals as it grows.
    """

    reg: float | Literal["auto"] = "auto"
    max_iterations: int = 10_000
    tolerance: float = 1e-4
    target_support: float = 2.0
    memory: int | None = None
    progot_steps: int = 8
    progot_schedule: Literal["linear", "exponential", "quadratic"] = "linear"
    marginal_penalty: float = 1.0


@dataclass(frozen=True)
class OTSolution:
    """A plan and how it came about.

    Args:
        coupling: (n, m), always finite.
        iterations: Passes over the kernel (one product with it and one with its transpose); 0 if not counted.
        marginal_error: L1 row error + L1 column error of the coupling.
        transport_cost: <T, C>, of the problem's own cost.
        seconds: Wall time.
        converged: Whether the solver met the tolerance: for solvers that keep the marginals, whether
            ``marginal_error`` is within it; for relaxed ones, whether the plan is the fixed point to within it.
        reg: Entropic regularisation in units of the cost; None for exact solvers.
        effective_support: Rows a column's mass comes from, mean of exp(entropy).
        mass: What the plan moves of a total of 1; less only where the marginals are relaxed. The coupling is divided
            by it.
        gap: How far ``transport_cost`` can at most be above the optimum, relative to it: the duality gap, in float64.
            None if not known.
    """

    coupling: Coupling
    iterations: int
    marginal_error: float
    transport_cost: float
    seconds: float
    converged: bool
    reg: float | None
    effective_support: float
    mass: float = 1.0
    gap: float | None = None

    @classmethod
    def of(
        cls,
        problem: OTProblem,
        coupling: Coupling,
        options: SolverOptions,
        *,
        started: float,
        iterations: int = 0,
        reg: float | None = None,
        finished: bool = True,
        mass: float | None = None,
        gap: float | None = None,
    ) -> OTSolution:
        """A coupling with its diagnostics measured.

        Args:
            started: ``time.perf_counter()`` at the beginning.
            finished: False when the solver itself says that it gave up.
            mass: Of a relaxed plan, for which ``finished`` alone says whether it converged.
        """
        error = coupling.marginal_error(problem.a, problem.b)
        return cls(
            coupling=coupling,
            iterations=iterations,
            marginal_error=error,
            transport_cost=coupling.transport_cost(problem.blocks()),
            effective_support=coupling.effective_support(),
            seconds=time.perf_counter() - started,
            converged=finished and (mass is not None or error <= options.tolerance),
            reg=reg,
            mass=1.0 if mass is None else mass,
            gap=gap,
        )


class OTSolver(Protocol):
    """What a module in ``ot/solvers/`` offers as ``SOLVER``; the module's name is its name in a recipe.

    Attributes:
        name: As in a recipe.
        summary: One line for ``deus-merge methods``.
        reference: Where it was published.
        needs_points: Whether it moves the points themselves: the cost must be a `PointCost` that keeps them.
        keeps_marginals: Whether its plans have the marginals a and b, to the tolerance; relaxed ones have not.
    """

    name: str
    summary: str
    reference: str
    needs_points: bool
    keeps_marginals: bool

    def solve(self, problem: OTProblem, options: SolverOptions = ...) -> OTSolution:
        """Solve one problem.

        Raises:
            SolverError: the solver does not handle such problems.
        """
        ...
