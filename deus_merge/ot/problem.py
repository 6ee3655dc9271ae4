"""What an optimal transport solver takes and gives: `OTProblem` in, `OTSolution` out, `OTSolver` between them.

A `Coupling` has total mass 1, so its rows sum to 1/n; a `TransportMap` has columns that sum to 1, so what it makes are
weighted means of rows. They differ by a factor n and are different types with different method names: mixing them up
is an error, not a model that is wrong by a factor of 4096.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from ..errors import SolverError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

#: Elements of one row block in passes over an n x m matrix: 2 MiB of float32, so that a block stays in the cache.
BLOCK_ELEMENTS = 1 << 19


def row_blocks(rows: int, columns: int) -> Iterator[slice]:
    """Slices that cut ``rows`` rows of ``columns`` elements into blocks of about `BLOCK_ELEMENTS`."""
    step = max(1, BLOCK_ELEMENTS // max(1, columns))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


@dataclass(frozen=True, eq=False)
class OTProblem:
    """Transport mass ``a`` on n points to mass ``b`` on m points, at ``cost[r, s]`` a unit from r to s.

    Args:
        cost: (n, m), float32 or float64, finite.
        a: (n,) non-negative, sums to 1.
        b: (m,) non-negative, sums to 1.

    Raises:
        SolverError: anything else.
    """

    cost: Tensor
    a: Tensor
    b: Tensor

    def __post_init__(self) -> None:
        import torch

        if self.cost.ndim != 2 or 0 in self.cost.shape:
            raise SolverError(
                "the cost is not a matrix", expected="(n, m), n and m at least 1", got=tuple(self.cost.shape)
            )
        if self.cost.dtype not in (torch.float32, torch.float64):
            raise SolverError("the cost has the wrong dtype", expected="float32 or float64", got=self.cost.dtype)
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
    def uniform(cls, cost: Tensor) -> OTProblem:
        """The problem with uniform marginals 1/n and 1/m."""
        n, m = cost.shape if cost.ndim == 2 else (1, 1)  # other shapes are refused below
        return cls(cost, cost.new_full((n,), 1 / max(n, 1)), cost.new_full((m,), 1 / max(m, 1)))

    @property
    def is_uniform_square(self) -> bool:
        """Whether the exact plan can be a permutation divided by n."""
        n, m = self.cost.shape
        return n == m and bool((self.a == self.a[0]).all()) and bool((self.b == self.b[0]).all())


@dataclass(frozen=True, eq=False)
class Coupling:
    """A transport plan: ``matrix[r, s]`` (n, m) is the mass that goes from r to s; total mass 1.

    `scripted_rows` and `scripted_columns` multiply by the coupling as it is, as the published OpT-DeUS script does;
    for weighted means of rows take `transport_map`.
    """

    matrix: Tensor

    def marginal_error(self, a: Tensor, b: Tensor) -> float:
        """L1 distance of the row sums to ``a`` (n,) plus that of the column sums to ``b`` (m,)."""
        rows = (self.matrix.sum(1).double() - a.double()).abs().sum()
        columns = (self.matrix.sum(0).double() - b.double()).abs().sum()
        return (rows + columns).item()

    def transport_cost(self, cost: Tensor) -> float:
        """<T, C>, accumulated in float64; ``cost`` (n, m)."""
        total = 0.0
        for block in row_blocks(*self.matrix.shape):
            total += self.matrix[block].flatten().dot(cost[block].flatten()).item()
        return total

    def effective_support(self) -> float:
        """How many rows a column's mass comes from: the mean over columns of exp(entropy)."""
        return effective_support(self.matrix)

    def transport_map(self, b: Tensor | None = None) -> TransportMap:
        """The barycentric map of this plan, n·T for uniform marginals. Shares the memory of the matrix.

        Args:
            b: (m,) the column mass to divide by; by default the actual column sums, so that means stay means.
        """
        return TransportMap(self.matrix, self.matrix.sum(0) if b is None else b)

    def scripted_rows(self, weight: Tensor) -> Tensor:
        """Tᵀ W: (n, d) -> (m, d)."""
        return self.matrix.t() @ weight

    def scripted_columns(self, weight: Tensor) -> Tensor:
        """W T: (d, n) -> (d, m)."""
        return weight @ self.matrix


class TransportMap:
    """A barycentric map M (n, m) with columns that sum to 1: every row it makes is a weighted mean of rows.

    Args:
        matrix: (n, m).
        column_mass: (m,) divides the columns when the map is applied, so that a coupling needs no scaled copy;
            None means that the columns of ``matrix`` already sum to 1.
    """

    def __init__(self, matrix: Tensor, column_mass: Tensor | None = None):
        self._matrix: Tensor | None = matrix
        self.shape: tuple[int, int] = (matrix.shape[0], matrix.shape[1])
        self._mass = None if column_mass is None else column_mass.clamp_min(_tiny(matrix))

    @classmethod
    def identity(cls, n: int) -> TransportMap:
        """The map that changes nothing; holds no matrix."""
        self = cls.__new__(cls)
        self._matrix, self._mass, self.shape = None, None, (n, n)
        return self

    @property
    def is_identity(self) -> bool:
        """Whether this map was made by `identity`."""
        return self._matrix is None

    @property
    def matrix(self) -> Tensor:
        """M (n, m), formed now."""
        import torch

        if self._matrix is None:
            return torch.eye(self.shape[0])
        return self._matrix if self._mass is None else self._matrix / self._mass

    def to_rows(self, weight: Tensor) -> Tensor:
        """Mᵀ W: rows of A (n, d) -> rows in B's order (m, d)."""
        self._check(weight.shape[0])
        if self._matrix is None:
            return weight
        moved = self._matrix.t() @ weight  # (m, d)
        return moved if self._mass is None else moved.div_(self._mass.unsqueeze(1))

    def to_columns(self, weight: Tensor) -> Tensor:
        """W M: columns of A (d, n) -> columns in B's order (d, m)."""
        self._check(weight.shape[1])
        if self._matrix is None:
            return weight
        moved = weight @ self._matrix  # (d, m)
        return moved if self._mass is None else moved.div_(self._mass)

    def _check(self, size: int) -> None:
        if size != self.shape[0]:
            raise SolverError("a transport map does not fit the weight", expected=self.shape[0], got=size)


@dataclass(frozen=True)
class SolverOptions:
    """How hard to solve.

    Args:
        reg: Entropic regularisation in units of the cost, or "auto": chosen so that a column's mass comes from
            ``target_support`` rows. Exact solvers ignore both.
        max_iterations: Passes over the kernel at most; exact solvers ignore it.
        tolerance: L1 marginal error, rows plus columns, at which to stop.
        target_support: See ``reg``.
    """

    reg: float | Literal["auto"] = "auto"
    max_iterations: int = 10_000
    tolerance: float = 1e-4
    target_support: float = 2.0


@dataclass(frozen=True)
class OTSolution:
    """A plan and how it came about.

    Args:
        coupling: (n, m), always finite.
        iterations: Passes over the kernel (one product with it and one with its transpose); 0 if not counted.
        marginal_error: L1 row error + L1 column error of the coupling.
        transport_cost: <T, C>.
        seconds: Wall time.
        converged: Whether ``marginal_error`` is within the tolerance.
        reg: Entropic regularisation in units of the cost; None for exact solvers.
        effective_support: Rows a column's mass comes from, mean of exp(entropy).
    """

    coupling: Coupling
    iterations: int
    marginal_error: float
    transport_cost: float
    seconds: float
    converged: bool
    reg: float | None
    effective_support: float

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
    ) -> OTSolution:
        """A coupling with its diagnostics measured.

        Args:
            started: ``time.perf_counter()`` at the beginning.
            finished: False when the solver itself says that it gave up.
        """
        error = coupling.marginal_error(problem.a, problem.b)
        return cls(
            coupling=coupling,
            iterations=iterations,
            marginal_error=error,
            transport_cost=coupling.transport_cost(problem.cost),
            effective_support=coupling.effective_support(),
            seconds=time.perf_counter() - started,
            converged=finished and error <= options.tolerance,
            reg=reg,
        )


class OTSolver(Protocol):
    """What a module in ``ot/solvers/`` offers as ``SOLVER``; the module's name is its name in a recipe."""

    name: str
    summary: str
    reference: str

    def solve(self, problem: OTProblem, options: SolverOptions = ...) -> OTSolution:
        """Solve one problem.

        Raises:
            SolverError: the solver does not handle such problems.
        """
        ...


def effective_support(matrix: Tensor, row_scale: Tensor | None = None) -> float:
    """Mean over columns of exp(entropy of the normalised column) of ``diag(row_scale) @ matrix``, (n, m) and (n,).

    Columns without mass are left out. One pass in row blocks, no (n, m) buffer.
    """
    import torch

    n, m = matrix.shape
    scale = matrix.new_ones(n) if row_scale is None else row_scale
    tiny = _tiny(matrix)
    mass = matrix.new_zeros(m)  # (m,) sum of x
    xlogx = matrix.new_zeros(m)  # (m,) sum of x log x
    for block in row_blocks(n, m):
        x = matrix[block] * scale[block].unsqueeze(1)  # (r, m)
        mass += x.sum(0)
        xlogx += x.clamp_min(tiny).log_().mul_(x).sum(0)
    full = mass > 0
    mass, xlogx = mass[full].double(), xlogx[full].double()
    if mass.numel() == 0:
        return 0.0
    return torch.exp(mass.log() - xlogx / mass).mean().item()


def _tiny(matrix: Tensor) -> float:
    import torch

    return torch.finfo(matrix.dtype).tiny
