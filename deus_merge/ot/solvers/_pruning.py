"""The dense side of exact assignment: passes over the cost that find potentials, a few edges, and proofs.

With potentials f (n,) of rows and g (n,) of columns the *reduced cost* of an edge is ``C[i, j] - f_i - g_j``. They
do not change which matchings are cheaper than others, and edges of large reduced cost are in no optimal one. A few
entropic (Sinkhorn) steps at a falling reg give good potentials. They need not be exact: the pruning is proved right
afterwards, because a matching is optimal if some potentials price all its edges at 0 and no edge below.

A pass reads the cost once, in row blocks that fit the cache, on its own device. Only the few edges go to the host.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

from ..blocks import row_blocks, tiny
from ..lower_bounds import LowerBounds
from ._steps import spread

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy import ndarray
    from torch import Tensor

    from ..problem import OTProblem

_NEAREST = 12  # edges of least reduced cost that each row and each column retains; the search adds a few more
_CROWD = 8 * _NEAREST  # edges a row above which those at the threshold, ties, are thinned
_LOWEST = 16  # edges of a part that are taken a row, of those priced lowest
_OPEN = 96  # edges a row whose price bounds leave open, or a 64th of them: above that better bounds are cheaper
_TRIES = 4  # rounds that may leave more open, since potentials were far off
_BUCKET = 64  # columns that are searched by their minimum, since few of many are wanted
_GROUPS = 128  # of rows, likewise
_FLOOR = -80.0  # smaller exponents are raised to this one: e^-80 is a normal number, and denormal ones are slow
_LEVELS = 24  # of reg, at most
_SHARP = 2.5  # reg is small enough where four in five rows have a softmax over no more columns than this,
_ALIKE = 3.0  # edges whose reduced costs differ by fewer reg count as tied
_STEADY = 0.97  # or where the number of columns stops falling: ties


class Edges(NamedTuple):
    """Some entries of the cost, on the host: ``cost[k]`` is the one at ``rows[k], columns[k]``."""

    rows: ndarray  # (q,) int64
    columns: ndarray  # (q,) int64
    cost: ndarray  # (q,) float64, exact


class Passes:
    """The passes over the cost of a square problem, which is read through `OTProblem.blocks` alone.

    Args:
        problem: Its cost may be `LowerBounds`: what is proved is then proved of the costs themselves.
    """

    def __init__(self, problem: OTProblem):
        self.problem, self.n, self.count = problem, problem.cost.shape[0], 0
        self.bounded = isinstance(problem.cost, LowerBounds)
        self._margin, self._crowded = 0.0, 0  # mean of estimates less bounds; rounds that leave many edges open
        self._known: dict[int, tuple[Tensor, Tensor]] = {}  # first row of a part -> its entries found, and their costs
        self._bucket = max(1, min(_BUCKET, self.n // 32))
        self._buckets = -(-self.n // self._bucket)
        self._scratch: Tensor | None = None

    @property
    def _searched(self) -> Tensor:
        """The scratch by rows, buckets' members and buckets: (r, bucket, buckets)."""
        assert self._scratch is not None, "searched within a pass"
        return self._scratch.view(-1, self._bucket, self._buckets)

    def potentials(self, factor: float, steps: int) -> tuple[Tensor, float]:
        """Column potentials (n,) by Sinkhorn steps, ``steps`` at each reg, falling by ``factor``; the last reg."""
        import torch

        g, reg = spread(self.problem)  # (n,)
        self.count += 1
        before = math.inf
        sums, tops = torch.empty_like(g), torch.empty_like(g)  # (n,) each
        for _ in range(_LEVELS):
            reg *= factor
            for _ in range(steps):
                g, sums, tops = self._sinkhorn_step(g, reg)
            # Over how many columns four in five rows spread at most, and the largest potential of a row.
            width, largest = torch.stack([sums.kthvalue(math.ceil(0.8 * self.n)).values, tops.abs().max()]).tolist()
            largest *= reg
            steady = _STEADY * before < width < self.n / 8
            if width <= _SHARP or steady or reg < 8 * _epsilon(g) * largest:
                break
            before = width
        return g, reg

    def _sinkhorn_step(self, g: Tensor, reg: float) -> tuple[Tensor, Tensor, Tensor]:
        """g after a step, the rows' sums relative to their maxima, and the maxima, in units of reg; (n,) each."""
        import torch

        at, ones = g / reg, g.new_ones(self.n)  # (n,)
        sums, tops, columns = torch.empty_like(g), torch.empty_like(g), torch.zeros_like(g)  # (n,)
        for rows, cost, x in self._parts():
            torch.add(at, cost, alpha=-1 / reg, out=x)  # (r, n)
            tops[rows] = x.amax(1)
            x.sub_(tops[rows].unsqueeze(1)).clamp_min_(_FLOOR).exp_()
            sums[rows] = x @ ones
            columns.addmv_(x.t(), 1 / sums[rows])
        return g - columns.clamp_min_(tiny(g)).log_().clamp_(-20, 20).mul_(reg), sums, tops

    def prune(self, g: Tensor, reg: float) -> tuple[Tensor, Edges]:
        """Potentials that price no edge below 0 and some edge of every row and column at 0; the edges next to 0.

        Args:
            g: (n,) column potentials.
            reg: The reg they were found at: edges that differ by less are equally good, and any may be retained.

        Three passes: f_i = min_j(C - g), then g_j = min_i(C - f), then the search for the edges.

        Returns:
            g: (n,), of the columns.
            edges: About the nearest `_NEAREST` of every row and of every column.
        """
        import torch

        f = torch.empty_like(g)  # (n,)
        for rows, cost, x in self._parts():
            f[rows] = torch.sub(cost, g, out=x).amin(1)
        g, reach = self._nearest_rows(f)  # (n,), (n,)
        found, reach = [], reach.clamp_min(_ALIKE * reg)
        for rows, cost, x in self._parts():
            torch.sub(cost, g, out=x)  # (r, n)
            minima = self._bucket_minima()[: len(cost)]  # (r, buckets)
            nearest = minima.kthvalue(min(_NEAREST, self._buckets)).values  # (r,)
            limit = nearest.maximum(minima.amin(1) + _ALIKE * reg)  # (r,)
            r, s = self._at_most(limit, len(cost))
            torch.sub(cost, g + reach, out=x)
            r2, s2 = self._at_most(f[rows], len(cost))
            new = cost[r2, s2] - g[s2] > limit[r2]  # not among them yet, by the same arithmetic
            r, s = torch.cat([r, r2[new]]), torch.cat([s, s2[new]])  # (q,)
            crowd = torch.bincount(r, minlength=len(cost))  # (r,)
            if bool((crowd > _CROWD).any()):  # ties: every row retains other ones, those next to the diagonal
                window = self.n * _CROWD / crowd.clamp_min(1)  # (r,)
                keep = (cost[r, s] - g[s] < nearest[r]) | ((s - r - rows.start) % self.n < window[r])
                r, s = r[keep], s[keep]
            found.append((r + rows.start, s, cost[r, s].double()))
        return g, _edges(found)

    def _nearest_rows(self, f: Tensor) -> tuple[Tensor, Tensor]:
        """g_j = min_i(C - f), and how far above it the nearest rows of the column go; both (n,)."""
        import torch

        minima = f.new_full((min(_GROUPS, self.n), self.n), math.inf)  # (groups, n)
        for rows, cost, x in self._parts():
            torch.sub(cost, f[rows].unsqueeze(1), out=x)
            # Row i is in group i modulo their number, as far as parts have several rows.
            for start in range(0, len(cost), len(minima)):
                at = (rows.start + start) % len(minima)
                some = x[start : start + len(minima)]
                head = some[: len(minima) - at]
                torch.minimum(minima[at : at + len(head)], head, out=minima[at : at + len(head)])
                tail = some[len(head) :]
                torch.minimum(minima[: len(tail)], tail, out=minima[: len(tail)])
        g = minima.amin(0)  # (n,)
        return g, minima.kthvalue(min(_NEAREST, len(minima)), dim=0).values - g

    def price(self, f: Tensor, g: Tensor, near: float) -> tuple[Tensor, Edges, bool] | None:
        """Every row's least ``C - g``, and the edges that potentials price lowest.

        Prices that the cost's own dtype cannot distinguish from 0 are computed again in float64, so all results are
        exact to its rounding.

        Args:
            f, g: (n,) float64. Some edge of every row is priced at 0.
            near: The price up to which edges are wanted, as far as bounds let them be known.

        Returns:
            least: (n,) float64.
            edges: Those priced at most at ``near``; where they are many, the lowest `_LOWEST` of every row, exact.
            proved: Whether no edge is priced below 0.
            None where bounds leave open so many edges that their costs take longer than better bounds.
        """
        import torch

        low = g.to(self.problem.cost.dtype)  # (n,)
        # Edges that are priced near 0 cost about f + g, so that a few units of rounding of these bound their error.
        nothing = negligible(f, g)
        slack = 4 * _epsilon(low) * (f.abs().max() + g.abs().max()) + nothing + max(0.0, near - self._margin)
        least = f.clone()  # (n,)
        found, proved, crowded = [], True, False
        for rows, cost, x in self._parts():
            torch.sub(cost, low, out=x)
            mine = f[rows]
            r, s = self._at_most((mine + slack).to(x.dtype), len(cost))
            if self.bounded:
                equal = (cost[r, s] == 0) & (mine[r] + g[s] <= nothing)  # no cost is below 0
                r, s = r[~equal], s[~equal]
                if len(r) > max(_OPEN, self.n // 64) * len(cost):
                    crowded = True  # by bounds or by potentials? Costs of a few edges tell.
                    lowest = _first_of_rows(r, x[r, s], _LOWEST)
                    r, s = r[lowest], s[lowest]
            entries = self._entries(rows, r, s) if self.bounded else cost[r, s].double()  # (q,)
            value = entries - g[s]  # (q,)
            least[rows] = mine.scatter_reduce(0, r, value, "amin")
            reduced = value - mine[r]
            proved &= not bool((reduced < -nothing).any())
            if len(r) > _LOWEST * len(cost):
                lowest = _first_of_rows(r, reduced, _LOWEST)
                r, s, entries = r[lowest], s[lowest], entries[lowest]
            found.append((r + rows.start, s, entries))
        self._crowded += crowded
        return None if crowded and (proved or self._crowded > _TRIES) else (least, _edges(found), proved)

    def estimated(self, edges: Edges) -> Edges:
        """Edges with estimates of their costs in the place of bounds."""
        import torch

        if not isinstance(cost := self.problem.cost, LowerBounds):
            return edges
        estimates = cost.estimates(*(torch.from_numpy(x).to(cost.device) for x in edges)).cpu().numpy()  # (q,)
        self._margin = float((estimates - edges.cost).mean())
        return edges._replace(cost=estimates)

    def exact(self, edges: Edges) -> Edges:
        """Edges with their costs in the place of bounds or estimates."""
        import torch

        r, s = (torch.from_numpy(x).to(self.problem.cost.device) for x in (edges.rows, edges.columns))
        return edges._replace(cost=self.problem.at(r, s).cpu().numpy())

    def _entries(self, rows: slice, r: Tensor, s: Tensor) -> Tensor:
        """Costs of edges of one part, (q,), (q,) -> (q,) float64; those of the pass before are not computed again."""
        import torch

        keys = r * self.n + s  # (q,), ascending by rows
        order = keys.argsort()
        before, costs = self._known.get(rows.start, (keys[:0], self.problem.a.new_zeros(0).double()))
        found = keys.new_zeros(len(keys), dtype=torch.float64)
        at = torch.searchsorted(before, keys)
        known = at < len(before)
        known[known.clone()] = before[at[known]] == keys[known]
        found[known] = costs[at[known]]
        found[~known] = self.problem.at(r[~known] + rows.start, s[~known])
        self._known[rows.start] = keys[order], found[order]
        return found

    def entries(self, rows: Tensor, columns: Tensor) -> Edges:
        """All edges between some rows and columns, (p,) and (q,) int64, the rows ascending."""
        found = []
        for block, cost, _ in self._parts():
            r = rows[(rows >= block.start) & (rows < block.stop)]
            if len(r):
                values = cost[r - block.start][:, columns].double()  # (p, q)
                found.append((r.repeat_interleave(len(columns)), columns.repeat(len(r)), values.flatten()))
        return _edges(found)

    def _at_most(self, limits: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Rows and columns of the first ``count`` rows' entries of the scratch that are at most the row's limit."""
        x, minima = self._searched, self._bucket_minima()
        r, k = (minima[:count] <= limits.unsqueeze(1)).nonzero().unbind(1)
        inside = x[r, :, k] <= limits[r].unsqueeze(1)  # (q, bucket)
        q, b = inside.nonzero().unbind(1)
        return r[q], b * self._buckets + k[q]

    def _bucket_minima(self) -> Tensor:
        """Minima over every ``_buckets``-th entry of the scratch's rows, (r, buckets)."""
        return self._searched.amin(1)

    def _parts(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """One pass: (rows, their cost (r, n), as much scratch). Past column n the scratch is infinite."""
        self.count += 1
        whole = self._bucket * self._buckets
        for block, cost in self.problem.blocks():
            for part in row_blocks(*cost.shape):
                if self._scratch is None or len(self._scratch) < part.stop - part.start:
                    self._scratch = cost.new_full((part.stop - part.start, whole), math.inf)
                rows = slice(block.start + part.start, block.start + part.stop)
                yield rows, cost[part], self._scratch[: part.stop - part.start, : self.n]


def _first_of_rows(rows: Tensor, values: Tensor, count: int) -> Tensor:
    """Where the ``count`` least values of every row are, (at most q,); rows (q,), values (q,)."""
    import torch

    order = values.argsort(stable=True)
    order = order[rows[order].argsort(stable=True)]
    sorted_rows = rows[order]
    rank = torch.arange(len(rows), device=rows.device) - torch.searchsorted(sorted_rows, sorted_rows)
    return order[rank < count]


def _edges(found: list[tuple[Tensor, Tensor, Tensor]]) -> Edges:
    import numpy as np

    if not found:
        return Edges(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0))
    return Edges(*(np.concatenate([one.cpu().numpy() for one in some]) for some in zip(*found, strict=True)))


def negligible(f: ndarray | Tensor, g: ndarray | Tensor) -> float:
    """The largest number that counts as 0 in float64 arithmetic with these potentials."""
    return 64 * 2.0**-52 * float(abs(f).max() + abs(g).max())


def _epsilon(x: Tensor) -> float:
    import torch

    return torch.finfo(x.dtype).eps
