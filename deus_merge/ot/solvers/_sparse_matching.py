"""The sparse side of exact assignment, on the host: the optimum among a few edges, and the potentials that prove it.

A primal-dual method in float64. Potentials f, g price no edge below 0; the edges priced at 0 are *tight*. A largest
matching of tight edges (Hopcroft and Karp 1973) leaves some rows free. From all of these at once, Dijkstra's algorithm
finds the nearest free columns in the residual graph, and the potentials move by the distances: shortest paths become
tight, so the next matching is larger. When it is perfect, it is optimal, and f and g prove it.

There are few phases, some tens, because each lengthens the matching along many paths; the searches are SciPy's. Without
ties, tight edges form a forest, fewer than 2 n edges. Where there are more, the largest matching is found as a flow
(Dinic 1970), since SciPy's matching can take time that grows exponentially with ties.
(SciPy's own ``min_weight_full_bipartite_matching`` is faster on easy graphs but took minutes on 512 points of a line:
its rows outbid each other by ever smaller amounts. It does not return potentials, either.)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ._pruning import Edges, negligible

if TYPE_CHECKING:
    from numpy import ndarray


class SparseMatching:
    """A growing set of edges between n rows and n columns; every row has some.

    Args:
        n: Rows, and columns.
        edges: The first ones.
        exact: Whether their costs are exact, not estimates.
    """

    def __init__(self, n: int, edges: Edges, exact: bool = True):
        import numpy as np

        self.n = n
        self._keys, self._cost, self._exact = np.zeros(0, np.int64), np.zeros(0), np.zeros(0, bool)
        self.add(edges, exact)

    def add(self, edges: Edges, exact: bool = True) -> None:
        """Add edges; of duplicates the last one counts."""
        import numpy as np

        keys = np.concatenate([edges.rows * self.n + edges.columns, self._keys])  # (q,)
        self._keys, first = np.unique(keys, return_index=True)
        self._cost = np.concatenate([edges.cost, self._cost])[first]
        self._exact = np.concatenate([np.full(len(edges.cost), exact), self._exact])[first]
        self._rows, self._columns = (x.astype(np.int32) for x in (self._keys // self.n, self._keys % self.n))
        self._starts = np.searchsorted(self._rows, np.arange(self.n))  # (n,) of the rows

    def unmatched(self) -> tuple[ndarray, ndarray]:
        """The rows and the columns that a largest matching leaves out; empty if a perfect one exists."""
        import numpy as np

        match = self._largest(np.ones(len(self._keys), bool))  # (n,)
        return np.flatnonzero(match < 0), np.setdiff1d(np.arange(self.n), match)

    def solve(self, g: ndarray) -> tuple[ndarray, ndarray, ndarray] | None:
        """The perfect matching of least cost, which must exist.

        Args:
            g: (n,) potentials of the columns to start from; good ones save time.

        Returns:
            match: (n,) int64, the column of every row.
            f, g: (n,) potentials that price the edges of the matching at 0 and none below, to rounding.
            None where rounding prevents a phase from matching more than the one before, as exact numbers would.
        """
        import numpy as np

        f = np.minimum.reduceat(self._cost - g[self._columns], self._starts)  # (n,)
        matched = -1
        while True:
            reduced = self._cost - f[self._rows] - g[self._columns]  # (q,)
            match = self._largest(reduced <= negligible(f, g) / 2)  # (n,)
            if match.min() >= 0:
                return match, f, g
            before, matched = matched, np.count_nonzero(match >= 0)
            if matched <= before:
                return None
            rows, columns = self._distances(match, np.maximum(reduced, 0))
            farthest = columns[np.bincount(match[match >= 0], minlength=self.n) == 0].max()
            f = f + np.maximum(farthest - rows, 0)
            g = g - np.maximum(farthest - columns, 0)

    def estimated(self, f: ndarray, g: ndarray, limit: float) -> Edges:
        """The edges with estimated costs that potentials (n,), (n,) price at most at a limit."""
        reduced = self._cost - f[self._rows] - g[self._columns]  # (q,)
        near = ~self._exact & (reduced <= limit + negligible(f, g))
        keys = self._keys[near]
        return Edges(keys // self.n, keys % self.n, self._cost[near])

    def price_of(self, share: float, f: ndarray, g: ndarray) -> float:
        """The price below which there are ``share`` edges a row."""
        import numpy as np

        reduced = self._cost - f[self._rows] - g[self._columns]  # (q,)
        return float(np.partition(reduced, at)[at]) if (at := int(share * self.n)) < len(reduced) else 0.0

    def cost(self, match: ndarray) -> ndarray:
        """The cost of every row's edge in a matching, (n,)."""
        import numpy as np

        return self._cost[np.searchsorted(self._keys, np.arange(self.n) * self.n + match)]

    def _distances(self, match: ndarray, reduced: ndarray) -> tuple[ndarray, ndarray]:
        """Lengths of the shortest alternating paths from the free rows to all rows and columns, (n,) and (n,)."""
        import numpy as np
        from scipy.sparse import csr_matrix
        from scipy.sparse.csgraph import dijkstra

        # A matched column is one node with its row, as nothing else leaves it; free columns are nodes n, n+1, ...
        matched = np.flatnonzero(match >= 0)
        node = np.full(self.n, -1, np.int32)  # (n,) of the columns
        node[match[matched]] = matched
        free = np.flatnonzero(node < 0)
        nodes = self.n + len(free)
        node[free] = np.arange(self.n, nodes)
        starts = np.concatenate([self._starts, np.full(len(free) + 1, len(reduced))]).astype(np.int32)
        graph = csr_matrix((reduced, node[self._columns], starts), shape=(nodes, nodes))
        distance = dijkstra(graph, indices=np.flatnonzero(match < 0), min_only=True)  # (nodes,)
        return distance[: self.n], distance[node]

    def _largest(self, taken: ndarray) -> ndarray:
        """A largest matching of some edges (q,) bool: the column of every row, or -1; (n,) int64."""
        import numpy as np
        from scipy.sparse import csr_matrix
        from scipy.sparse.csgraph import maximum_bipartite_matching, maximum_flow

        n, count = self.n, np.count_nonzero(taken)
        starts = np.concatenate([[0], np.cumsum(taken)])[np.append(self._starts, len(taken))].astype(np.int32)
        columns = self._columns[taken]
        if count < 2 * n:
            graph = csr_matrix((np.ones(count, np.int8), columns, starts), shape=(n, n))
            return maximum_bipartite_matching(graph, perm_type="column").astype(np.int64)
        # Ties, on some of which that takes minutes. Nodes: rows, columns, the source before rows, the sink.
        ends = np.concatenate([starts, count + np.arange(1, n + 1), [count + 2 * n] * 2]).astype(np.int32)
        nodes = np.concatenate([n + columns, np.full(n, 2 * n + 1), np.arange(n)]).astype(np.int32)
        network = csr_matrix((np.ones(count + 2 * n, np.int32), nodes, ends), shape=(2 * n + 2, 2 * n + 2))
        flow = maximum_flow(network, 2 * n, 2 * n + 1).flow[:n].tocoo()
        used = (flow.data > 0) & (flow.col < 2 * n)  # not the reverse of an edge from the source
        match = np.full(n, -1)
        match[flow.row[used]] = flow.col[used] - n
        return match
