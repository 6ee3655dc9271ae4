"""Transport plans, as matrices, permutations or row blocks computed on demand; and the maps they induce.

A `Coupling` has total mass 1, so its rows sum to 1/n (where marginals are relaxed: on average). A `TransportMap` has
columns that sum to 1, so its results are weighted means of rows. They differ by a factor n and are different types with
different method names: mixing them up is an error, not a model that is wrong by a factor of 4096.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

from ..core.errors import SolverError
from .blocks import column_sums, effective_support, matrix_blocks, product_blocks, row_blocks, tiny
from .points import dense

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from torch import Tensor

    from .points import Points
    from .problem import OTProblem


class Measures(NamedTuple):
    """Measurements of a plan; see the methods of `Coupling` with these names."""

    marginal_error: float
    transport_cost: float
    effective_support: float


class Coupling:
    """A transport plan: ``matrix[r, s]`` (n, m) is the mass that goes from r to s; total mass 1.

    `scripted_rows` and `scripted_columns` multiply by the coupling as it is, as the published OpT-DeUS script does;
    for weighted means of rows use `transport_map`.

    Args:
        matrix: T (n, m).
        unmatched: (m,) bool, the columns that the solver left without mass; None if every column has mass.

    Attributes:
        permutation: (n,) int64: the row whose mass goes to each column, where it is all that goes there; else None.
    """

    shape: tuple[int, int]
    unmatched: Tensor | None
    permutation: Tensor | None = None

    def __init__(self, matrix: Tensor, unmatched: Tensor | None = None):
        self._matrix = matrix
        self.shape, self.unmatched = (matrix.shape[0], matrix.shape[1]), unmatched

    @property
    def matrix(self) -> Tensor:
        """T (n, m)."""
        return self._matrix

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """T in row blocks: (rows, (r, m)); valid until the next one is requested."""
        return matrix_blocks(self._matrix)

    def column_mass(self) -> Tensor:
        """Sums of the columns, (m,)."""
        mass = None
        for _, block in self.blocks():
            mass = block.sum(0) if mass is None else mass + block.sum(0)  # (m,)
        assert mass is not None, "a plan has rows"
        return mass

    def marginal_error(self, a: Tensor, b: Tensor) -> float:
        """L1 distance of the row sums to ``a`` (n,) plus that of the column sums to ``b`` (m,)."""
        return self._marginal_error(a, b).item()

    def transport_cost(self, cost: Iterable[tuple[slice, Tensor]]) -> float:
        """<T, C>; ``cost`` in row blocks, as `OTProblem.blocks` and `matrix_blocks` yield them."""
        return self._transport_cost(cost).item()

    def effective_support(self) -> float:
        """The number of rows that a column's mass comes from: the mean over columns of exp(entropy)."""
        return effective_support(block for _, block in self.blocks())

    def measures(self, problem: OTProblem) -> Measures:
        """`marginal_error`, `transport_cost` and `effective_support`, with one read from the device."""
        import torch

        sums = column_sums(block for _, block in self.blocks())
        paid = self._transport_cost(problem.blocks())
        read = [self._marginal_error(problem.a, problem.b), paid, *sums.mean_support()]
        error, paid, support, complete = torch.stack([x.double() for x in read]).tolist()
        return Measures(error, paid, support if complete else sums.mean_support_of_full())

    def transport_map(self, b: Tensor | None = None) -> TransportMap:
        """The barycentric map of this plan, n·T for uniform marginals. Shares the memory of the plan.

        Args:
            b: (m,) the column mass to divide by; by default the actual column sums, so that means stay means.
        """
        return TransportMap(self, self.column_mass() if b is None else b)

    def scripted_rows(self, weight: Tensor) -> Tensor:
        """Tᵀ W: (n, d) -> (m, d)."""
        result = weight.new_zeros(self.shape[1], weight.shape[1])  # (m, d)
        for block, plan in self.blocks():
            result.addmm_(plan.t(), weight[block])
        return result

    def scripted_columns(self, weight: Tensor) -> Tensor:
        """W T: (d, n) -> (d, m)."""
        result = weight.new_zeros(weight.shape[0], self.shape[1])  # (d, m)
        for block, plan in self.blocks():
            result.addmm_(weight[:, block], plan)
        return result

    def mean_rows(self, weight: Tensor, mass: Tensor) -> Tensor:
        """Tᵀ W over the mass (m,) of the columns: (n, d) -> (m, d)."""
        return self.scripted_rows(weight).div_(mass.unsqueeze(1))

    def mean_columns(self, weight: Tensor, mass: Tensor) -> Tensor:
        """W T over the mass (m,) of the columns: (d, n) -> (d, m)."""
        return self.scripted_columns(weight).div_(mass)

    def mean_row_blocks(self, weight: Points, mass: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """`mean_rows` in row blocks: (rows, (r, d))."""
        yield slice(0, self.shape[1]), self.mean_rows(dense(weight), mass)

    def _marginal_error(self, a: Tensor, b: Tensor) -> Tensor:
        """() float64, on the device."""
        rows, columns = b.new_zeros(()).double(), b.new_zeros(b.shape).double()  # (), (m,)
        for block, plan in self.blocks():
            rows += (plan.sum(1).double() - a[block].double()).abs().sum()
            columns += plan.sum(0).double()
        return rows + (columns - b.double()).abs().sum()

    def _transport_cost(self, cost: Iterable[tuple[slice, Tensor]]) -> Tensor:
        """() float64, on the device."""
        paid = None
        for (_, plan), (_, c) in zip(self.blocks(), cost, strict=True):
            for part in row_blocks(*plan.shape):  # float32 sums of small parts, added up in float64
                more = plan[part].flatten().dot(c[part].flatten()).double()  # ()
                paid = more if paid is None else paid + more
        assert paid is not None, "a plan has rows"
        return paid


class LazyCoupling(Coupling):
    """A plan that is never stored: its row blocks are computed on every pass.

    Args:
        shape: (n, m).
        compute: Called for each pass; yields the `product_blocks` of T in order.
        unmatched: As for `Coupling`.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        compute: Callable[[], Iterator[tuple[slice, Tensor]]],
        unmatched: Tensor | None = None,
    ):
        self.shape, self._compute, self.unmatched = shape, compute, unmatched

    @property
    def matrix(self) -> Tensor:
        """T (n, m), formed now."""
        matrix = None
        for rows, block in self.blocks():
            matrix = block.new_empty(self.shape) if matrix is None else matrix  # (n, m)
            matrix[rows] = block
        assert matrix is not None, "a plan has rows"
        return matrix

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        return self._compute()


class PermutationCoupling(Coupling):
    """A plan that sends all of every row to one column: n numbers instead of n².

    Args:
        rows: (n,) int64: ``rows[s]`` is the row whose mass, 1/n, goes to column s.
        like: Any tensor of the dtype and device that `matrix` shall have.
    """

    def __init__(self, rows: Tensor, like: Tensor):
        self.rows = self.permutation = rows
        self._like, self.unmatched = like, None
        self.shape = (len(rows), len(rows))

    @property
    def columns(self) -> Tensor:
        """(n,) the column that row r goes to."""
        return self.rows.argsort()

    @property
    def matrix(self) -> Tensor:
        """T (n, n), formed now."""
        import torch

        return torch.cat([block for _, block in self.blocks()])

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        n, columns = len(self.rows), self.columns
        for block in product_blocks(n, n):
            plan = self._like.new_zeros(block.stop - block.start, n)  # (r, n)
            yield block, plan.scatter_(1, columns[block].unsqueeze(1), 1 / n)

    def column_mass(self) -> Tensor:
        return self._like.new_full((len(self.rows),), 1 / len(self.rows))

    def effective_support(self) -> float:
        return 1.0

    def measures(self, problem: OTProblem) -> Measures:
        import torch

        columns = self.columns
        paid = problem.at(torch.arange(len(columns), device=columns.device), columns).sum() / len(columns)
        error, paid = torch.stack([self._marginal_error(problem.a, problem.b), paid]).tolist()
        return Measures(error, paid, 1.0)

    def scripted_rows(self, weight: Tensor) -> Tensor:
        return weight.index_select(0, self.rows) / len(self.rows)

    def scripted_columns(self, weight: Tensor) -> Tensor:
        return weight.index_select(1, self.rows) / len(self.rows)

    def mean_rows(self, weight: Tensor, mass: Tensor) -> Tensor:
        return weight.index_select(0, self.rows)

    def mean_columns(self, weight: Tensor, mass: Tensor) -> Tensor:
        return weight.index_select(1, self.rows)

    def mean_row_blocks(self, weight: Points, mass: Tensor) -> Iterator[tuple[slice, Tensor]]:
        for rows in row_blocks(len(self.rows), weight.shape[1]):
            yield rows, weight[self.rows[rows]]

    def _marginal_error(self, a: Tensor, b: Tensor) -> Tensor:
        n = len(self.rows)
        return (a.double() - 1 / n).abs().sum() + (b.double() - 1 / n).abs().sum()

    def _transport_cost(self, cost: Iterable[tuple[slice, Tensor]]) -> Tensor:
        columns, paid = self.columns, self._like.new_zeros(()).double()
        for rows, c in cost:
            paid += c.gather(1, columns[rows].unsqueeze(1)).double().sum()
        return paid / len(self.rows)


class RowMap(Protocol):
    """A map from the rows of A to the rows of B, (n, m), that a plan induces.

    Attributes:
        unmatched: (m,) bool: rows of B that nothing of A goes to; the results there are zeros, and the caller must put
            B's own rows in their place. None if there are none.
    """

    @property
    def shape(self) -> tuple[int, int]: ...

    @property
    def unmatched(self) -> Tensor | None: ...

    def to_rows(self, weight: Tensor) -> Tensor:
        """Rows of A (n, d) -> rows in B's order (m, d)."""
        ...

    def to_columns(self, weight: Tensor) -> Tensor:
        """Columns of A (d, n) -> columns in B's order (d, m)."""
        ...


class TransportMap:
    """A barycentric map M (n, m) with columns that sum to 1: each result is a weighted mean of rows (`RowMap`).

    Only plans with relaxed marginals have `unmatched` columns.

    Args:
        coupling: The plan.
        column_mass: (m,) divides the columns when the map is applied, so that a coupling needs no scaled copy.

    Attributes:
        permutation: See `Coupling`: the map then puts rows into another order.
    """

    def __init__(self, coupling: Coupling, column_mass: Tensor):
        self._coupling = coupling
        self.shape: tuple[int, int] = coupling.shape
        self.unmatched: Tensor | None = coupling.unmatched
        self.permutation: Tensor | None = coupling.permutation
        self._mass = column_mass.clamp_min(tiny(column_mass))

    @property
    def matrix(self) -> Tensor:
        """M (n, m), formed now."""
        return self._coupling.matrix / self._mass

    def to_rows(self, weight: Tensor) -> Tensor:
        """Mᵀ W: rows of A (n, d) -> rows in B's order (m, d)."""
        _check_size(self.shape[0], weight.shape[0])
        return self._coupling.mean_rows(weight, self._mass)

    def to_columns(self, weight: Tensor) -> Tensor:
        """W M: columns of A (d, n) -> columns in B's order (d, m)."""
        _check_size(self.shape[0], weight.shape[1])
        return self._coupling.mean_columns(weight, self._mass)

    def row_blocks(self, weight: Points) -> Iterator[tuple[slice, Tensor]]:
        """`to_rows` in row blocks, (rows, (r, d)), without a copy of all rows where the plan is a permutation."""
        _check_size(self.shape[0], weight.shape[0])
        return self._coupling.mean_row_blocks(weight, self._mass)


class ScriptedMap:
    """A coupling applied as it is, as the published OpT-DeUS script does: results are 1/n of weighted means (`RowMap`).

    Columns without mass stay zeros, as in the script, so nothing counts as unmatched.
    """

    unmatched: Tensor | None = None

    def __init__(self, coupling: Coupling):
        self._coupling = coupling
        self.shape: tuple[int, int] = coupling.shape

    def to_rows(self, weight: Tensor) -> Tensor:
        """Tᵀ W: (n, d) -> (m, d)."""
        _check_size(self.shape[0], weight.shape[0])
        return self._coupling.scripted_rows(weight)

    def to_columns(self, weight: Tensor) -> Tensor:
        """W T: (d, n) -> (d, m)."""
        _check_size(self.shape[0], weight.shape[1])
        return self._coupling.scripted_columns(weight)


def _check_size(expected: int, got: int) -> None:
    if got != expected:
        raise SolverError("a transport map does not fit the weight", expected=expected, got=got)
