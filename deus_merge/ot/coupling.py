"""Transport plans, as matrices, permutations or row blocks made on demand; and the maps they induce.

A `Coupling` has total mass 1, so its rows sum to 1/n (where marginals are relaxed: on average); a `TransportMap` has
columns that sum to 1, so what it makes are weighted means of rows. They differ by a factor n and are different types
with different method names: mixing them up is an error, not a model that is wrong by a factor of 4096.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..core.errors import SolverError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

#: Elements of one row block in element-wise passes over an n x m matrix: 8 MiB of float32.
BLOCK_ELEMENTS = 1 << 21
#: Elements of one row block in matrix products: 32 MiB of float32.
PRODUCT_ELEMENTS = 1 << 23


def row_blocks(rows: int, columns: int, elements: int = BLOCK_ELEMENTS, multiple: int = 1) -> Iterator[slice]:
    """Slices that cut ``rows`` rows of ``columns`` elements into blocks of about ``elements``, each but the last of a
    multiple of ``multiple`` rows."""
    step = max(1, elements // max(1, columns) // multiple) * multiple
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def product_blocks(rows: int, columns: int) -> Iterator[slice]:
    """`row_blocks` for matrix products. Whatever is stored and whatever is made again uses these same blocks, so that
    the memory a run may take does not show in its bytes: also not by way of the blocks' addresses, which are multiples
    of 64 bytes in both cases (on some processors the library's products round differently elsewhere)."""
    return row_blocks(rows, columns, PRODUCT_ELEMENTS, multiple=16)


class Coupling:
    """A transport plan: ``matrix[r, s]`` (n, m) is the mass that goes from r to s; total mass 1.

    `scripted_rows` and `scripted_columns` multiply by the coupling as it is, as the published OpT-DeUS script does;
    for weighted means of rows take `transport_map`.
    """

    def __init__(self, matrix: Tensor):
        self._matrix = matrix
        self.shape: tuple[int, int] = (matrix.shape[0], matrix.shape[1])

    @property
    def matrix(self) -> Tensor:
        """T (n, m)."""
        return self._matrix

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """T in row blocks: (rows, (r, m)); good until the next one is asked for."""
        for block in product_blocks(*self.shape):
            yield block, self._matrix[block]

    def column_mass(self) -> Tensor:
        """Sums of the columns, (m,)."""
        return sum(block.sum(0) for _, block in self.blocks())

    def marginal_error(self, a: Tensor, b: Tensor) -> float:
        """L1 distance of the row sums to ``a`` (n,) plus that of the column sums to ``b`` (m,)."""
        rows, columns = 0.0, b.new_zeros(b.shape).double()
        for block, plan in self.blocks():
            rows += (plan.sum(1).double() - a[block].double()).abs().sum().item()
            columns += plan.sum(0).double()
        return rows + (columns - b.double()).abs().sum().item()

    def transport_cost(self, cost: Iterator[tuple[slice, Tensor]] | Tensor) -> float:
        """<T, C>; ``cost`` (n, m), or its row blocks as `costs.PointCost.blocks` yields them."""
        blocks = iter(cost) if not hasattr(cost, "shape") else ((s, cost[s]) for s in product_blocks(*self.shape))
        total = 0.0
        for (_, plan), (_, c) in zip(self.blocks(), blocks, strict=True):
            for part in row_blocks(*plan.shape):  # float32 sums of small parts, added up in float64
                total += plan[part].flatten().dot(c[part].flatten()).item()
        return total

    def effective_support(self) -> float:
        """How many rows a column's mass comes from: the mean over columns of exp(entropy)."""
        return effective_support(block for _, block in self.blocks())

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

    def _mean_rows(self, weight: Tensor, mass: Tensor) -> Tensor:
        return self.scripted_rows(weight).div_(mass.unsqueeze(1))

    def _mean_columns(self, weight: Tensor, mass: Tensor) -> Tensor:
        return self.scripted_columns(weight).div_(mass)


class LazyCoupling(Coupling):
    """A plan that is never stored: its row blocks are made on every pass.

    Args:
        shape: (n, m).
        make: Called for each pass; yields the `product_blocks` of T in order.
    """

    def __init__(self, shape: tuple[int, int], make: Callable[[], Iterator[tuple[slice, Tensor]]]):
        self.shape, self._make = shape, make

    @property
    def matrix(self) -> Tensor:
        """T (n, m), formed now."""
        matrix = None
        for rows, block in self.blocks():
            matrix = block.new_empty(self.shape) if matrix is None else matrix  # (n, m)
            matrix[rows] = block
        return matrix

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        return self._make()


class PermutationCoupling(Coupling):
    """A plan that sends all of every row to one column: n numbers instead of n².

    Args:
        rows: (n,) int64: ``rows[s]`` is the row whose mass, 1/n, goes to column s.
        like: Any tensor of the dtype and device that `matrix` shall have.
    """

    def __init__(self, rows: Tensor, like: Tensor):
        self.rows, self._like = rows, like
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

    def marginal_error(self, a: Tensor, b: Tensor) -> float:
        n = len(self.rows)
        return ((a.double() - 1 / n).abs().sum() + (b.double() - 1 / n).abs().sum()).item()

    def transport_cost(self, cost: Iterator[tuple[slice, Tensor]] | Tensor) -> float:
        n, columns = len(self.rows), self.columns
        blocks = iter(cost) if not hasattr(cost, "shape") else ((s, cost[s]) for s in product_blocks(n, n))
        return sum(c.gather(1, columns[s].unsqueeze(1)).double().sum().item() for s, c in blocks) / n

    def effective_support(self) -> float:
        return 1.0

    def scripted_rows(self, weight: Tensor) -> Tensor:
        return weight.index_select(0, self.rows) / len(self.rows)

    def scripted_columns(self, weight: Tensor) -> Tensor:
        return weight.index_select(1, self.rows) / len(self.rows)

    def _mean_rows(self, weight: Tensor, mass: Tensor) -> Tensor:
        return weight.index_select(0, self.rows)

    def _mean_columns(self, weight: Tensor, mass: Tensor) -> Tensor:
        return weight.index_select(1, self.rows)


class TransportMap:
    """A barycentric map M (n, m) with columns that sum to 1: every row it makes is a weighted mean of rows.

    Args:
        coupling: The plan.
        column_mass: (m,) divides the columns when the map is applied, so that a coupling needs no scaled copy.
    """

    def __init__(self, coupling: Coupling, column_mass: Tensor):
        self._coupling: Coupling | None = coupling
        self.shape: tuple[int, int] = coupling.shape
        self._mass = column_mass.clamp_min(_tiny(column_mass))

    @classmethod
    def identity(cls, n: int) -> TransportMap:
        """The map that changes nothing; holds no matrix."""
        self = cls.__new__(cls)
        self._coupling, self.shape = None, (n, n)
        return self

    @property
    def is_identity(self) -> bool:
        """Whether this map was made by `identity`."""
        return self._coupling is None

    @property
    def unmatched(self) -> Tensor | None:
        """(m,) bool: the columns that no mass goes to, where `to_rows` and `to_columns` give zeros; None if there are
        none. Only plans with relaxed marginals have some: what they match with is nothing, so keep B's own there."""
        if self._coupling is None:
            return None
        empty = self._mass <= _tiny(self._mass)  # (m,)
        return empty if bool(empty.any()) else None

    @property
    def matrix(self) -> Tensor:
        """M (n, m), formed now."""
        import torch

        return torch.eye(self.shape[0]) if self._coupling is None else self._coupling.matrix / self._mass

    def to_rows(self, weight: Tensor) -> Tensor:
        """Mᵀ W: rows of A (n, d) -> rows in B's order (m, d)."""
        self._check(weight.shape[0])
        return weight if self._coupling is None else self._coupling._mean_rows(weight, self._mass)

    def to_columns(self, weight: Tensor) -> Tensor:
        """W M: columns of A (d, n) -> columns in B's order (d, m)."""
        self._check(weight.shape[1])
        return weight if self._coupling is None else self._coupling._mean_columns(weight, self._mass)

    def _check(self, size: int) -> None:
        if size != self.shape[0]:
            raise SolverError("a transport map does not fit the weight", expected=self.shape[0], got=size)


def effective_support(blocks: Iterator[Tensor]) -> float:
    """Mean over columns of exp(entropy of the normalised column) of a matrix given as row blocks (r, m).

    Columns without mass are left out. One pass, no (n, m) buffer.
    """
    import torch

    mass = xlogx = None  # (m,) sums of x and of x log x
    for whole in blocks:
        for part in row_blocks(*whole.shape):
            x = whole[part]  # (r, m)
            sums = x.sum(0), x.clamp_min(_tiny(x)).log_().mul_(x).sum(0)
            mass, xlogx = sums if mass is None else (mass + sums[0], xlogx + sums[1])
    full = mass > 0
    mass, xlogx = mass[full].double(), xlogx[full].double()
    if mass.numel() == 0:
        return 0.0
    return torch.exp(mass.log() - xlogx / mass).mean().item()


def _tiny(matrix: Tensor) -> float:
    import torch

    return torch.finfo(matrix.dtype).tiny
