"""The input and the output of an optimal transport solver (`solver.OTSolver`): `OTProblem` and `OTSolution`."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, NamedTuple

from ..core.errors import SolverError
from .blocks import matrix_blocks
from .costs import PointCost
from .coupling import Coupling

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor


class Marginals(NamedTuple):
    """Facts about the marginals of a problem.

    Attributes:
        positive: Whether all points have mass.
        uniform: Whether the points of either side have equal masses.
    """

    positive: bool
    uniform: bool


@dataclass(frozen=True, eq=False)
class OTProblem:
    """Transport mass ``a`` on n points to mass ``b`` on m points, at ``cost[r, s]`` a unit from r to s.

    Args:
        cost: (n, m), float32 or float64, finite; or the `PointCost` that computes it in row blocks.
        a: (n,) non-negative, sums to 1.
        b: (m,) non-negative, sums to 1.
        known: Facts about a and b; None to find them out.

    Raises:
        SolverError: anything else.
    """

    cost: Tensor | PointCost
    a: Tensor
    b: Tensor
    known: Marginals | None = None

    def __post_init__(self) -> None:
        import torch

        if len(self.cost.shape) != 2 or 0 in self.cost.shape:
            raise SolverError(
                "the cost is not a matrix", expected="(n, m), n and m at least 1", got=tuple(self.cost.shape)
            )
        if self.cost.dtype not in (torch.float32, torch.float64):
            raise SolverError("the cost has the wrong dtype", expected="float32 or float64", got=self.cost.dtype)
        for name, marginal, size in (("a", self.a, self.cost.shape[0]), ("b", self.b, self.cost.shape[1])):
            if tuple(marginal.shape) != (size,):
                raise SolverError(f"marginal {name} does not fit the cost", expected=(size,), got=tuple(marginal.shape))
        # Everything that is asked about the values, in one read from the device.
        asked = [] if isinstance(self.cost, PointCost) else [*torch.aminmax(self.cost)]  # NaN passes through both
        if self.known is None:
            for marginal in (self.a, self.b):
                asked += [*torch.aminmax(marginal), marginal.double().sum()]
        read = torch.stack([x.double() for x in asked]).tolist() if asked else []
        if not isinstance(self.cost, PointCost):
            low, high, *read = read
            if not (math.isfinite(low) and math.isfinite(high)):
                raise SolverError("the cost is not finite", got=f"minimum {low}, maximum {high}")
        if self.known is None:
            object.__setattr__(self, "known", _known(read[:3], read[3:]))

    @classmethod
    def uniform(cls, cost: Tensor | PointCost) -> OTProblem:
        """The problem with uniform marginals 1/n and 1/m."""
        import torch

        n, m = cost.shape if len(cost.shape) == 2 else (1, 1)  # other shapes are refused by the constructor
        a, b = (torch.full((k,), 1 / max(k, 1), dtype=cost.dtype, device=cost.device) for k in (n, m))
        return cls(cost, a, b, Marginals(positive=True, uniform=True))

    @property
    def marginals(self) -> Marginals:
        """Facts about a and b."""
        assert self.known is not None, "set by the constructor"
        return self.known

    @property
    def matrix(self) -> Tensor:
        """The whole cost, (n, m), in memory."""
        return self.cost.dense() if isinstance(self.cost, PointCost) else self.cost

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """The cost in row blocks, in order: (rows, (r, m)). Read only, and valid until the next one is requested."""
        return self.cost.blocks() if isinstance(self.cost, PointCost) else matrix_blocks(self.cost)

    def at(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Single entries of the cost, exact: (q,), (q,) int64 -> (q,) float64."""
        if isinstance(self.cost, PointCost):
            return self.cost.at(rows, columns)
        return self.cost[rows, columns].double()

    def with_cost(self, cost: Tensor | PointCost) -> OTProblem:
        """The same masses at another cost, (n, m)."""
        return OTProblem(cost, self.a, self.b, self.known)

    def stored(self) -> OTProblem:
        """The same problem with its cost as one matrix."""
        return self.with_cost(self.cost.dense()) if isinstance(self.cost, PointCost) else self

    def keep(self, nbytes: int | None, disk: bool = False) -> None:
        """`PointCost.keep`; a matrix is in memory already."""
        if isinstance(self.cost, PointCost):
            self.cost.keep(nbytes, disk)

    @property
    def is_uniform_square(self) -> bool:
        """Whether the exact plan can be a permutation divided by n."""
        n, m = self.cost.shape
        return n == m and self.marginals.uniform


def _known(a: list[float], b: list[float]) -> Marginals:
    """The facts that follow from the least and the largest entry and the sum of each marginal, which is checked."""
    for name, (least, largest, total) in (("a", a), ("b", b)):
        if not (math.isfinite(least) and math.isfinite(largest) and least >= 0):
            raise SolverError(f"marginal {name} has negative or non-finite entries")
        if abs(total - 1) > 1e-4:
            raise SolverError(f"marginal {name} is not a distribution", expected="a sum of 1", got=total)
    return Marginals(positive=a[0] > 0 and b[0] > 0, uniform=a[0] == a[1] and b[0] == b[1])


@dataclass(frozen=True)
class SolverOptions:
    """How hard to solve: the options that all solvers share. Those of a single solver are fields of the solver.

    Args:
        reg: Entropic regularisation in units of the cost, or "auto": chosen so that a column's mass comes from
            ``target_support`` rows. Exact solvers ignore both.
        max_iterations: Maximum number of passes over the kernel; exact solvers ignore it.
        tolerance: L1 marginal error, rows plus columns, at which to stop.
        target_support: See ``reg``.
        memory: Bytes that n x m buffers may take; None for no limit. Solvers that are able to put such buffers
            on the disk, or to compute them again in row blocks, do so instead; the plan is the same bit for bit.
    """

    reg: float | Literal["auto"] = "auto"
    max_iterations: int = 10_000
    tolerance: float = 1e-4
    target_support: float = 2.0
    memory: int | None = None

    def with_room(self, nbytes: int, beside: int) -> SolverOptions | None:
        """These options with less memory; None where the rest would be too little.

        Args:
            nbytes: Bytes that are taken.
            beside: Bytes that must be left.
        """
        if self.memory is None:
            return self
        return replace(self, memory=self.memory - nbytes) if self.memory >= nbytes + beside else None


DEFAULT_OPTIONS = SolverOptions()


@dataclass(frozen=True)
class OTSolution:
    """A plan, and measurements of it and of the solve.

    Args:
        coupling: (n, m), always finite.
        iterations: Passes over the kernel (one product with it and one with its transpose); 0 if not counted.
        marginal_error: L1 row error + L1 column error of the coupling.
        transport_cost: <T, C>, of the problem's own cost.
        seconds: Wall time.
        converged: Whether the solver met the tolerance: for solvers that keep the marginals, whether
            ``marginal_error`` is within it; for relaxed ones, whether the plan is the fixed point to within it.
        reg: Entropic regularisation in units of the cost; None for exact solvers.
        effective_support: Rows that a column's mass comes from, mean of exp(entropy).
        mass: The mass that the plan moves, of a total of 1; less only where the marginals are relaxed. The coupling is
            divided by it.
        gap: Upper bound of how far ``transport_cost`` is above the optimum, relative to it: the duality gap, in
            float64. None if unknown.
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
        """A coupling, measured.

        Args:
            started: ``time.perf_counter()`` at the beginning.
            finished: False when the solver itself gave up.
            mass: The mass of a relaxed plan, for which ``finished`` alone decides whether it converged.
        """
        error, paid, support = coupling.measures(problem)
        return cls(
            coupling=coupling,
            iterations=iterations,
            marginal_error=error,
            transport_cost=paid,
            effective_support=support,
            seconds=time.perf_counter() - started,
            converged=finished and (mass is not None or error <= options.tolerance),
            reg=reg,
            mass=1.0 if mass is None else mass,
            gap=gap,
        )
