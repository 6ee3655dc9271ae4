"""Exact assignment through few edges: potentials prune the cost, a sparse solver matches, and a dual proves it.

With potentials g of the columns and f of the rows the *reduced cost* of an edge is ``C[i, j] - f_i - g_j``. Potentials
change no matching's rank, and near the optimum an edge of large reduced cost is in no optimal matching.

1. A few Sinkhorn steps at a falling reg find g (pruning by entropic duals: Schmitzer 2019, arXiv 1610.06519).
2. Edges of small reduced cost are kept, about `_EDGES` a row, and each column's nearest.
3. ``scipy.sparse.csgraph.min_weight_full_bipartite_matching`` matches them (Jonker and Volgenant 1987, sparse).
4. Shortest paths in the residual graph give the matching's own dual. One pass over the whole cost then tells which
   edges it prices below zero; they join, and step 3 is taken again. When there are none, the matching is optimal.

Memory: row blocks of the cost and the few edges; the cost itself is read by `OTProblem.blocks` only.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ..coupling import row_blocks
from ..problem import OTProblem
from ._steps import spread

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

_EDGES = 16  # edges kept a row, about
_LEVELS = 24  # halvings of reg at most
_SHARP = 2.0  # reg is small enough when most rows have a softmax over about so many columns
_FLOOR = -80.0  # exponents below are as good: e^-80 is a normal number, and denormal ones are slow
_ROUNDS = 12  # sparse problems solved at most


def pruned_assignment(problem: OTProblem) -> tuple[np.ndarray, float] | None:
    """The optimal matching of a square problem and its relative duality gap.

    Returns:
        columns: (n,) the column of each row; and the gap over the optimal cost's size. None where few edges do not
        do (many ties): a dense solver must.
    """
    import numpy as np

    n = problem.cost.shape[0]
    g = _potentials(problem)  # (n,)
    least, reach = _rows(problem, g)  # (n,), ()
    keys, costs = _edges(problem, g, least, reach)  # (q,) each: row * n + column, C
    base = least.double().cpu().numpy(), g.double().cpu().numpy()
    for _ in range(_ROUNDS):
        columns = _match(n, keys, costs, base)
        if columns is None:
            return None
        dual = _dual(n, keys, costs, columns, base[1])
        if dual is None:
            return None
        primal, bound, new_keys, new_costs = _price(problem, columns, dual)
        size = max(abs(primal), np.finfo(np.float64).tiny)
        if len(new_keys) == 0 or primal - bound <= 1e-12 * size:
            return columns, max(0.0, primal - bound) / size
        keys, order = np.unique(np.concatenate((keys, new_keys)), return_index=True)
        costs = np.concatenate((costs, new_costs))[order]
        base = base[0], dual
    return None


def _potentials(problem: OTProblem) -> Tensor:
    """Potentials of the columns by one Sinkhorn step a level, (n,)."""
    n = problem.cost.shape[0]
    g, reg = spread(problem)
    for _ in range(_LEVELS):
        columns, sums = g.new_zeros(n), g.new_empty(n)  # (n,)
        for block, cost in problem.blocks():
            for part in row_blocks(*cost.shape):
                rows = slice(block.start + part.start, block.start + part.stop)
                x = (g - cost[part]).mul_(1 / reg)  # (r, n)
                x.sub_(x.amax(1, keepdim=True)).clamp_min_(_FLOOR).exp_()
                sums[rows] = x.sum(1)
                columns.addmv_(x.t(), 1 / sums[rows])
        g = g - columns.clamp_min_(1e-30).log_().clamp_(-20, 20).mul_(reg)
        if sums.median().item() <= _SHARP:
            break
        reg /= 2
    return g


def _rows(problem: OTProblem, g: Tensor) -> tuple[Tensor, float]:
    """Least ``C - g`` of each row, (n,), and the reduced cost below which a row has about `_EDGES` edges."""
    n = len(g)
    least, reach = g.new_empty(n), []
    stride = max(1, n // 256)
    for block, cost in problem.blocks():
        for part in row_blocks(*cost.shape):
            rows = slice(block.start + part.start, block.start + part.stop)
            x = cost[part] - g  # (r, n)
            least[rows] = x.amin(1)
            some = x[-rows.start % stride :: stride]
            if len(some):
                nearest = some.kthvalue(min(n, _EDGES), dim=1).values - some.amin(1)
                reach += nearest.tolist()
    reach.sort()
    return least, reach[int(0.9 * (len(reach) - 1))]


def _edges(problem: OTProblem, g: Tensor, least: Tensor, reach: float) -> tuple[np.ndarray, np.ndarray]:
    """Edges of reduced cost up to ``reach``, at most a few times `_EDGES` a row, and the nearest row of each column."""
    import numpy as np
    import torch

    n = len(g)
    keys, costs = [], []
    best, at = g.new_full((n,), math.inf), torch.zeros(n, dtype=torch.int64, device=g.device)

    def add(rows: Tensor, columns: Tensor, values: Tensor) -> None:
        keys.append((rows * n + columns).cpu().numpy())
        costs.append(values.double().cpu().numpy())

    for block, cost in problem.blocks():
        for part in row_blocks(*cost.shape):
            rows = slice(block.start + part.start, block.start + part.stop)
            x = cost[part] - g - least[rows].unsqueeze(1)  # (r, n)
            near = (x <= reach).nonzero()  # (q, 2)
            if len(near) > 8 * _EDGES * len(x):  # ties: the nearest of each row in some order
                columns = x.topk(min(n, 2 * _EDGES), dim=1, largest=False).indices  # (r, k)
                own = torch.arange(len(x), device=g.device).repeat_interleave(columns.shape[1])
                near = torch.stack((own, columns.flatten()), dim=1)
            r, s = near.unbind(1)
            add(r + rows.start, s, cost[part][r, s])
            value, index = x.min(0)  # (n,)
            better = value < best
            best, at = value.where(better, best), (index + rows.start).where(better, at)
    every = torch.arange(n, device=g.device)
    nearest = g.new_empty(n)
    for block, cost in problem.blocks():
        mine = (at >= block.start) & (at < block.stop)
        nearest[mine] = cost[at[mine] - block.start, every[mine]]
    add(at, every, nearest)
    joined, order = np.unique(np.concatenate(keys), return_index=True)
    return joined, np.concatenate(costs)[order]


def _match(n: int, keys: np.ndarray, costs: np.ndarray, base: tuple[np.ndarray, np.ndarray]) -> np.ndarray | None:
    """The best matching by these edges, (n,); None when they hold no perfect one."""
    from scipy.sparse import csr_matrix
    from scipy.sparse.csgraph import min_weight_full_bipartite_matching

    rows, columns = keys // n, keys % n
    reduced = costs - base[0][rows] - base[1][columns]
    size = max(1e-300, abs(reduced).max())
    reduced += size - min(0.0, reduced.min())  # above 0, or they would not count as edges
    try:
        return min_weight_full_bipartite_matching(csr_matrix((reduced, (rows, columns)), shape=(n, n)))[1]
    except ValueError:
        return None


def _dual(n: int, keys: np.ndarray, costs: np.ndarray, matched: np.ndarray, start: np.ndarray) -> np.ndarray | None:
    """Column potentials under which no edge is priced below its row's match: Bellman-Ford from ``start``; (n,)."""
    import numpy as np

    rows, columns = keys // n, keys % n
    own = np.searchsorted(keys, np.arange(n) * n + matched)  # each row's match among the edges
    step = costs - costs[own][rows]  # row i moves from its match to column k
    order = np.argsort(columns, kind="stable")
    source, step, columns = matched[rows][order], step[order], columns[order]
    starts = np.flatnonzero(np.diff(columns, prepend=-1))
    tolerance = 1e-14 * max(1e-300, abs(costs).max())
    dual = start.copy()
    for _ in range(2 * n):
        reached = np.minimum.reduceat(dual[source] + step, starts)  # (n,): every column has an edge
        if not (reached < dual - tolerance).any():
            return dual
        dual = np.minimum(dual, reached)
    return None


def _price(problem: OTProblem, matched: np.ndarray, dual: np.ndarray) -> tuple[float, float, np.ndarray, np.ndarray]:
    """The matching's cost, the dual's, and the edges it prices below zero; one pass in float64."""
    import numpy as np
    import torch

    n = len(dual)
    v = torch.from_numpy(dual).to(problem.a.device)  # (n,)
    columns = torch.from_numpy(matched.astype(np.int64)).to(problem.a.device)
    primal, bound, keys, costs = 0.0, v.sum().item(), [], []
    for block, cost in problem.blocks():
        for part in row_blocks(*cost.shape):
            rows = slice(block.start + part.start, block.start + part.stop)
            own = cost[part].gather(1, columns[rows].unsqueeze(1)).double()  # (r, 1)
            x = cost[part].double().sub_(v)  # (r, n)
            low = x.amin(1, keepdim=True)  # (r, 1)
            priced = own - v[columns[rows]].unsqueeze(1)  # (r, 1)
            primal += own.sum().item()
            bound += low.sum().item()
            worse = (low < priced - 1e-13 * (priced.abs() + own.abs())).flatten().nonzero().flatten()
            if len(worse):
                few = x[worse].topk(min(n, 8), dim=1, largest=False)  # (w, 8)
                below = (few.values < priced[worse]).nonzero()
                r, s = worse[below[:, 0]], few.indices[below[:, 0], below[:, 1]]
                keys.append(((r + rows.start) * n + s).cpu().numpy())
                costs.append(cost[part][r, s].double().cpu().numpy())
    empty = np.zeros(0, dtype=np.int64), np.zeros(0)
    return primal, bound, np.concatenate(keys or empty[:1]), np.concatenate(costs or empty[1:])
