"""How the entropic solvers solve their semi-dual: annealing, Sinkhorn steps, Newton steps, and the search for a reg.

1. *Annealing*: reg starts at the spread of the cost and is halved to its goal, every level starting from the last
   one's dual (Schmitzer 2019, arXiv 1610.06519, section 3).
2. *Sinkhorn steps* while they are quick: ``u = p / Kv``, ``log v += k log(q/c)``, ``k = rho/(rho + reg)``; log v is
   absorbed into g before it grows.
3. *Newton steps* where they are not: the semi-dual's Hessian ``diag(c + reg/rho q) - k Tᵀ diag(1/p) T`` is solved by
   conjugate gradients, preconditioned by its own diagonal (Newton after Sinkhorn: Tang et al. 2024, arXiv 2401.12253).
   The diagonal is what makes it quick: for plans near a permutation it holds almost all of the Hessian.
"""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING

from ...core.errors import SolverError
from ..coupling import Coupling
from ..problem import OTProblem, SolverOptions
from ._semidual import Kernel, State, tiny

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

_LOOSE = 0.02  # L1 marginal error that suffices before reg is halved, and to measure the support
_QUICK = 0.6  # a Sinkhorn step that leaves less than this share of the error is worth repeating
_CG_STEPS = 30  # conjugate gradient steps of one Newton step
_LONGEST = 10.0  # no Newton step changes an entry of log v by more
_ABSORB = 30.0  # |log v| above which it moves into g and the kernel is built anew
_SUPPORT_ERROR = 0.1  # `reg: auto` stops when the support is within this share of its target
_PATIENCE = 500  # passes without a better error after which rounding, not the limit, is taken to end the solve


def check_reg(reg: object) -> None:
    """Raise a SolverError unless reg is a positive number or "auto"."""
    if reg != "auto" and not (isinstance(reg, (int, float)) and math.isfinite(reg) and reg > 0):
        raise SolverError("reg must be positive", expected='a number above 0, or "auto"', got=repr(reg))


def solve(kernel: Kernel, options: SolverOptions) -> tuple[State, float]:
    """The state at `SolverOptions.reg`, annealed from the spread of the cost, and that reg."""
    g, level = spread(kernel.problem)  # the dual in the limit of large reg, and where to start
    if options.reg == "auto":
        g, reg = _find_reg(kernel, g, level, options.target_support)
    else:
        reg = float(options.reg)
        g = anneal(kernel, g, level, reg, options.tolerance)
    return solve_level(kernel, g, reg, 0.95 * options.tolerance), reg  # the plan's own sums round a little


def anneal(kernel: Kernel, g: Tensor, level: float, reg: float, tolerance: float) -> Tensor:
    """A dual (m,) to start from at reg: that of ``level``, halved until reg is near."""
    while level > 2 * reg:
        g = solve_level(kernel, g, level, max(_LOOSE, tolerance)).dual(level)
        level /= 2
    return g


def solve_level(kernel: Kernel, g: Tensor, reg: float, tolerance: float) -> State:
    """Sinkhorn and Newton steps at one reg until the error is met or the passes are spent."""
    state = kernel.build(g, reg)
    best, best_at, wait = state.error, kernel.passes, 0
    while state.error > tolerance and not kernel.spent and kernel.passes - best_at < _PATIENCE:
        before = state.error
        state = _sinkhorn_step(kernel, state)
        if state.y.abs().max() > _ABSORB:
            state = kernel.build(state.dual(reg), reg)
        wait -= 1
        if state.error > tolerance and state.error > _QUICK * before and wait < 0:
            moved = _newton_step(kernel, state, tolerance)
            # A direction that rounding spoilt would be spoilt again at once: some plain steps first.
            state, wait = (moved, 0) if moved is not None else (state, 10)
        if state.error < 0.99 * best:
            best, best_at = state.error, kernel.passes
    return state


def _sinkhorn_step(kernel: Kernel, state: State) -> State:
    """v <- v b/c; a column that lost all its mass to underflow comes back over several steps."""
    least = tiny(state.c)
    ratio = state.q.clamp_min(least) / state.c.clamp_min(least)
    return kernel.state(state.g, state.y + ratio.log().clamp_(-20, 20).mul_(kernel.damping))


def _newton_step(kernel: Kernel, state: State, tolerance: float) -> State | None:
    """A Newton step of the semi-dual by preconditioned conjugate gradients; None if it finds nothing better."""
    residual = state.q - state.c  # (m,), also the gradient
    goal = max(min(0.5, math.sqrt(state.error)) * state.error, 0.3 * tolerance)
    diagonal = kernel.hessian_diagonal(state)
    x = residual.new_zeros(residual.shape)
    z = residual / diagonal
    direction, rz = z, residual.dot(z)
    for _ in range(_CG_STEPS):
        product = kernel.hessian(state, direction)
        curvature = direction.dot(product)
        if not curvature > 0:
            break
        length = rz / curvature
        x = x + length * direction
        residual = residual - length * product
        if residual.abs().sum() < goal or kernel.spent:
            break
        z = residual / diagonal
        rz, previous = residual.dot(z), rz
        direction = z + (rz / previous) * direction
    x = x - x.dot(kernel.b)  # a constant shift of log v changes nothing
    longest = x.abs().max().item()
    if not 0 < longest < math.inf:
        return None
    # Nearly decoupled columns make entries of any length, where the quadratic model means nothing. They are cut one by
    # one: scaling the whole step down to them would stop all others.
    bound = min(longest, _LONGEST)
    for _ in range(5):
        if kernel.spent:
            break
        moved = kernel.state(state.g, state.y + x.clamp(-bound, bound))
        if moved.value >= state.value or moved.error < state.error:
            return moved
        bound /= 4
    return None


def _find_reg(kernel: Kernel, g: Tensor, level: float, target: float) -> tuple[Tensor, float]:
    """The reg whose plan has ``target`` effective support, and a dual to start from there.

    Support grows with reg. Halving (or doubling) reg brackets the target, then log support is interpolated in log reg.
    Loose plans suffice. Where no reg reaches the target (equal rows, target beyond n), the nearest tried one is taken.
    """

    stride = max(1, kernel.shape[1] // 512)  # about 512 columns tell enough while the target is far

    def measure(g: Tensor, reg: float) -> tuple[float, float, Tensor]:
        state = solve_level(kernel, g, reg, _LOOSE)
        support = kernel.support(state, stride)
        if stride > 1 and support < 2 * target:
            support = kernel.support(state, 1)
        return math.log(reg), math.log(max(support, 1.0)), state.dual(reg)

    goal = math.log(max(target, 1.0))
    near = math.log1p(_SUPPORT_ERROR)
    low = high = measure(g, level)  # (log reg, log support, dual)
    for _ in range(40):
        if kernel.spent or low[1] <= goal <= high[1] or abs(low[1] - goal) <= near or abs(high[1] - goal) <= near:
            break
        if low[1] > goal:
            low, high = measure(low[2], math.exp(low[0]) / 2), low
        else:
            low, high = high, measure(high[2], math.exp(high[0]) * 2)
        if not 1e-5 * level <= math.exp(low[0]) <= 1e3 * level:
            break
    best = min(low, high, key=lambda point: abs(point[1] - goal))
    for _ in range(12):
        if abs(best[1] - goal) <= near or kernel.spent or not low[1] < goal < high[1]:
            break
        share = min(max((goal - low[1]) / (high[1] - low[1]), 0.1), 0.9)
        middle = measure(high[2], math.exp(low[0] + share * (high[0] - low[0])))
        low, high = (low, middle) if middle[1] > goal else (middle, high)
        best = min(best, middle, key=lambda point: abs(point[1] - goal))
    return best[2], math.exp(best[0])


def spread(problem: OTProblem) -> tuple[Tensor, float]:
    """The dual for reg -> infinity (column means), and twice the cost's deviation from row plus column effects.

    Above that reg the plan is nearly the product of its marginals, so annealing need not start higher.
    """
    import torch

    n, m = problem.cost.shape
    columns, sample = problem.b.new_zeros(m), []
    stride = -(-n // 256)
    for block, cost in problem.blocks():
        columns += cost.t() @ cost.new_full((len(cost),), 1 / n)  # (m,)
        sample.append(cost[-block.start % stride :: stride].clone())
    columns = columns - columns.mean()
    sample = torch.cat(sample) - columns  # (at most 256, m)
    sample = sample - sample.mean(1, keepdim=True)
    spread = 2 * sample.square().mean().sqrt().item()
    return columns, max(spread, 1e-6 * sample.abs().max().item(), 1e-6 * columns.abs().max().item()) or 1.0


def with_mass(problem: OTProblem) -> tuple[OTProblem, Callable[[Coupling], Coupling]]:
    """The problem on the points that have mass, and the function that puts its plan back among the others."""
    rows, columns = problem.a > 0, problem.b > 0  # (n,), (m,)
    if bool(rows.all()) and bool(columns.all()):
        return problem, lambda plan: plan
    problem = problem.stored()
    inner = OTProblem(problem.cost[rows][:, columns], problem.a[rows], problem.b[columns])
    return inner, partial(spread_out, rows=rows, columns=columns)


def spread_out(plan: Coupling, rows: Tensor, columns: Tensor) -> Coupling:
    """A plan between the points that have mass, among all of them; rows (n,), columns (m,) bool."""
    matrix = plan.matrix
    whole = matrix.new_zeros(len(rows), len(columns))  # (n, m)
    whole[rows.nonzero(), columns.nonzero().squeeze(1)] = matrix
    return Coupling(whole)
