"""Exact transport between equally many points of equal mass: a permutation, proved optimal.

Small problems go to SciPy's dense ``linear_sum_assignment``. For larger ones almost all of the n² edges are pruned:

1. a few Sinkhorn steps give potentials, and of every row and column the nearest edges by reduced cost are retained
   (`_pruning`; Schmitzer 2019 prunes entropic transport so);
2. a sparse primal-dual solver finds the best matching among these edges, and its potentials (`_sparse_matching`);
3. a pass over the whole cost prices every edge with them. If none is below 0, the matching is optimal among all:
   linear programming duality. Otherwise the edges priced lowest are added, and step 2 is repeated (column generation).

Step 3 also gives the proof, `OTSolution.gap`: how far the cost of the matching is above that of a dual solution, which
no matching undercuts. The memory needed beyond the cost is some 100 bytes an edge, about 30 edges a row.

Between points, these passes read `LowerBounds` of the cost, from products in the fastest precision of the processor.
An edge that its bound prices at 0 or more needs no better number; the costs of the others, a few a row, and of all that
are matched are computed exactly, each by itself. So the matching does not depend on the precision of the passes.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from ...core.errors import SolverError
from ..costs import PointCost
from ..coupling import PermutationCoupling
from ..lower_bounds import LowerBounds, fast_bounds
from ..problem import DEFAULT_OPTIONS, OTProblem, OTSolution, SolverOptions
from ..solver import OTSolver
from ._pruning import Passes
from ._sparse_matching import SparseMatching

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy import ndarray
    from torch import Tensor

_DENSE = 1024  # rows up to which SciPy's dense solver is as fast
_ROUNDS = 20  # of column generation, at most
_NEAR = 3.0  # edges a row, of those retained, below whose price all edges are added in a round
#: How to find potentials: the factor by which reg falls, and Sinkhorn steps at each reg; the second if the first fails.
_ATTEMPTS = ((1 / 4, 1), (1 / 2, 4))


class Assignment(OTSolver):
    """The solver ``assignment``; ``reg`` and ``max_iterations`` do not apply."""

    name = "assignment"
    needs_points = lazy_points = True
    summary = "exact one-to-one matching for uniform square problems, proved optimal; n to 28672, any device"
    reference = "Crouse 2016, IEEE TAES 52(4); primal-dual, pruned: Kuhn 1955; Schmitzer 2019, arXiv 1610.06519"

    def solve(self, problem: OTProblem, options: SolverOptions = DEFAULT_OPTIONS) -> OTSolution:
        """Solve exactly; see `OTSolver.solve` for the arguments.

        Returns:
            A `PermutationCoupling`; ``iterations`` counts the passes over the cost (0: SciPy's dense solver).

        Raises:
            SolverError: not a square problem with uniform marginals.
        """
        if not problem.is_uniform_square:
            raise SolverError(
                "assignment matches equally many rows of equal mass",
                expected="a square cost and uniform marginals",
                got=f"cost {tuple(problem.cost.shape)}",
                hint="use `solver: emd`",
            )
        start = time.perf_counter()
        found, count = None, 0
        if len(problem.a) > _DENSE:
            for cost in _costs(problem.cost):
                problem = problem.with_cost(cost)
                problem.keep(options.memory, disk=True)
                passes = Passes(problem)
                for attempt in _ATTEMPTS:
                    found = found or _sparse(passes, *attempt)
                count += passes.count
                if found:
                    break
                problem.keep(0)
        if found is None:
            problem = problem.stored()
        columns, gap = found or (_dense(problem.matrix), None)  # (n,)
        coupling = PermutationCoupling(columns.argsort(), problem.a)
        return OTSolution.of(problem, coupling, options, started=start, iterations=count, gap=gap)


def _costs(cost: Tensor | PointCost) -> Iterator[Tensor | PointCost]:
    """What to read instead of the cost, the cheapest first; for points, bounds that leave near ties to exact costs."""
    if isinstance(cost, PointCost):
        if bounds := fast_bounds(cost):
            yield bounds
        yield LowerBounds(cost, cost.dtype)
    yield cost


def _dense(cost: Tensor) -> Tensor:
    """SciPy's optimum: the column of every row, (n,)."""
    import torch
    from scipy.optimize import linear_sum_assignment

    return torch.from_numpy(linear_sum_assignment(cost.cpu().numpy())[1]).to(cost.device)


def _sparse(passes: Passes, factor: float, steps: int) -> tuple[Tensor, float] | None:
    """The optimal column of every row, (n,), and the relative duality gap; None where few edges do not suffice."""
    import torch

    n, device = passes.n, passes.problem.cost.device
    g, edges = passes.prune(*passes.potentials(factor, steps))  # (n,)
    g = g.double().cpu().numpy()
    graph = SparseMatching(n, passes.estimated(edges), exact=not passes.bounded)
    rows, columns = graph.unmatched()
    if len(rows) ** 2 > 16 * n:
        return None
    if len(rows):
        more = passes.entries(*(torch.from_numpy(x).to(device) for x in (rows, columns)))
        graph.add(passes.estimated(more), exact=not passes.bounded)
    if passes.bounded:
        if (solved := graph.solve(g)) is None:
            return None
        _, f, g = solved
        _correct(graph, passes, f, g)
    for _ in range(_ROUNDS):
        if (solved := _solve(graph, passes, g)) is None:
            return None
        match, f, g = solved  # (n,) each
        near = graph.price_of(_NEAR, f, g)
        priced = passes.price(*(torch.from_numpy(x).to(device) for x in (f, g)), near=near)
        if priced is None:
            return None
        least, edges, proved = priced
        if proved:
            paid, bound = float(graph.cost(match).sum()), float(least.sum()) + float(g.sum())
            # A matching that costs nothing is measured by its potentials.
            size = max(abs(paid), 2.0**-30 * float(abs(f).sum() + abs(g).sum()))
            return torch.from_numpy(match).to(device), max(0.0, paid - bound) / size if size else 0.0
        graph.add(edges)
    return None


def _correct(graph: SparseMatching, passes: Passes, f: ndarray, g: ndarray) -> None:
    """Give exact costs to the edges that may be in a better matching, by how far those of the best one are off."""
    tight = graph.estimated(f, g, 0.0)
    exact = passes.exact(tight)
    graph.add(exact)
    graph.add(passes.exact(graph.estimated(f, g, 2 * float(abs(exact.cost - tight.cost).max(initial=0.0)))))


def _solve(graph: SparseMatching, passes: Passes, g: ndarray) -> tuple[ndarray, ndarray, ndarray] | None:
    """`SparseMatching.solve`, until no tight edge has an estimated cost."""
    while (solved := graph.solve(g)) is not None:
        _, f, g = solved
        if not len((edges := graph.estimated(f, g, 0.0)).cost):
            break
        graph.add(passes.exact(edges))
    return solved


SOLVER = Assignment()
