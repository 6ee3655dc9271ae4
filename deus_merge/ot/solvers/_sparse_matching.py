"""The sparse side of exact assignment, on the host: the optimum among a few edges, and the potentials that prove it.

Everything is float64. The matching is SciPy's ``min_weight_full_bipartite_matching`` (Jonker and Volgenant's shortest
augmenting paths, for sparse costs); its potentials are the lengths of shortest paths in the residual graph.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from numpy import ndarray

    from ._pruning import Edges


class SparseMatching:
    """A growing set of edges between n rows and n columns.

    Args:
        n: Rows, and columns.
        edges: The first ones.
    """

    def __init__(self, n: int, edges: Edges):
        self.n, self._keys, self._cost = n, edges.rows * n + edges.columns, edges.cost
        self._sort()

    def add(self, edges: Edges) -> None:
        """More edges; those that are there already count once."""
        import numpy as np

        self._keys = np.concatenate([self._keys, edges.rows * self.n + edges.columns])
        self._cost = np.concatenate([self._cost, edges.cost])
        self._sort()

    def _sort(self) -> None:
        import numpy as np

        self._keys, first = np.unique(self._keys, return_index=True)
        self._cost = self._cost[first]
        self._rows, self._columns = self._keys // self.n, self._keys % self.n  # (q,)

    def unmatched(self) -> tuple[ndarray, ndarray]:
        """The rows and the columns that a largest matching leaves out; empty if a perfect one exists."""
        import numpy as np
        from scipy.sparse.csgraph import maximum_bipartite_matching

        match = maximum_bipartite_matching(self._matrix(np.ones(len(self._keys))), perm_type="column")  # (n,)
        return np.flatnonzero(match < 0), np.setdiff1d(np.arange(self.n), match)

    def match(self, f: ndarray, g: ndarray) -> ndarray:
        """The perfect matching of least cost: the column of every row, (n,).

        Args:
            f, g: (n,) potentials of rows and columns; good ones make it quick.
        """
        from scipy.sparse.csgraph import min_weight_full_bipartite_matching

        reduced = self._cost - f[self._rows] - g[self._columns]  # (q,)
        reduced -= reduced.min()
        reduced += reduced.max() * 2.0**-10 or 1.0  # SciPy takes a weight of 0 for no edge
        return min_weight_full_bipartite_matching(self._matrix(reduced))[1].astype("int64")

    def cost(self, match: ndarray) -> ndarray:
        """What every row pays, (n,)."""
        import numpy as np

        return self._cost[np.searchsorted(self._keys, np.arange(self.n) * self.n + match)]

    def potentials(self, match: ndarray, g: ndarray) -> tuple[ndarray, ndarray]:
        """Potentials f, g (n,) that price the optimal matching at 0 and no edge below, as near to ``g`` as can be.

        Shortest paths: column j can be reached from column m_i through row i at ``C_ij - C_i,m_i``, and
        ``g_j <= g_m + length`` is what is asked for. Bellman-Ford, all edges at once; an optimal matching has no
        negative cycle, so it ends. Where g is lowered is chosen once from above, once from below, and the middle taken,
        which leaves room on both sides for the edges that are not here.
        """
        import numpy as np

        own = self.cost(match)  # (n,)
        length = self._cost - own[self._rows]  # (q,)
        source = match[self._rows]  # (q,)
        by_target = np.lexsort((self._rows, self._columns))
        by_source = np.lexsort((self._columns, source))
        below = _relax(g, self._columns[by_target], source[by_target], length[by_target])
        above = -_relax(-g, source[by_source], self._columns[by_source], length[by_source])
        g = (below + above) / 2
        return own - g[match], g

    def _matrix(self, weights: ndarray):
        from scipy.sparse import csr_matrix

        return csr_matrix((weights, (self._rows, self._columns)), shape=(self.n, self.n))


def _relax(distance: ndarray, target: ndarray, source: ndarray, length: ndarray) -> ndarray:
    """The greatest x (n,) below ``distance`` with x[target] <= x[source] + length; every target occurs, in order."""
    import numpy as np

    starts = np.flatnonzero(np.diff(target, prepend=-1))
    rounding = 4 * 2.0**-52 * (np.abs(distance).max() + np.abs(length).max())
    for _ in range(len(distance) + 1):
        shorter = np.minimum.reduceat(distance[source] + length, starts)  # (n,)
        if not (shorter < distance - rounding).any():
            break
        distance = np.minimum(distance, shorter)
    return distance
