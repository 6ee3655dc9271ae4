"""Entropic optimal transport that stays finite and converges at small regularisation, in torch on any device.

The dual is kept as one vector g (m,). With the kernel ``K = softmax_rows((g - C)/reg)``, which cannot overflow, the
plan is ``T = diag(u) K diag(v)``, and every step below is a product with K or Kᵀ:

1. *Annealing*: reg starts at the spread of the cost and is halved to its goal, every level starting from the last
   one's dual (Schmitzer 2019, arXiv 1610.06519, section 3).
2. *Sinkhorn steps* while they are quick: ``u = a / Kv``, ``v = b / Kᵀu``; log v is absorbed into g before it grows.
3. *Newton steps* where they are not: the semi-dual's Hessian ``diag(Tᵀ1) - Tᵀ diag(1/a) T`` is solved by conjugate
   gradients, preconditioned by its own diagonal (the use of Newton after Sinkhorn: Tang et al. 2024, arXiv 2401.12253).
   The diagonal is what makes it quick: for plans near a permutation it holds almost all of the Hessian.

Memory: the cost and the kernel, two n x m buffers; the plan is made in the kernel's place.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...errors import SolverError
from ..problem import Coupling, OTProblem, OTSolution, SolverOptions, effective_support, row_blocks

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

_DEFAULTS = SolverOptions()
_LOOSE = 0.02  # L1 marginal error that suffices before reg is halved, and to measure the support
_QUICK = 0.6  # a Sinkhorn step that leaves less than this share of the error is worth repeating
_CG_STEPS = 30  # conjugate gradient steps of one Newton step
_LONGEST = 10.0  # no Newton step changes an entry of log v by more
_ABSORB = 30.0  # |log v| above which it moves into g and the kernel is built anew
_SUPPORT_ERROR = 0.1  # `reg: auto` stops when the support is within this share of its target
_PATIENCE = 500  # passes without a better error after which rounding, not the limit, is taken to end the solve


class Sinkhorn:
    """The solver ``sinkhorn``."""

    name = "sinkhorn"
    summary = "entropic, stabilised, Sinkhorn and Newton steps; any device"
    reference = "Cuturi 2013, arXiv 1306.0895; Tang et al. 2024, arXiv 2401.12253"

    def solve(self, problem: OTProblem, options: SolverOptions = _DEFAULTS) -> OTSolution:
        """Solve by annealed Sinkhorn and Newton steps; see `OTSolver.solve` for the arguments.

        Raises:
            SolverError: reg is neither positive nor "auto".
        """
        reg, tolerance = options.reg, options.tolerance
        if reg != "auto" and not (isinstance(reg, (int, float)) and math.isfinite(reg) and reg > 0):
            raise SolverError("reg must be positive", expected='a number above 0, or "auto"', got=repr(reg))
        start = time.perf_counter()
        inner, place = _with_mass(problem)
        kernel = _Kernel(inner, options.max_iterations)
        g, level = _spread(inner.cost)  # the dual in the limit of large reg, and where to start
        if reg == "auto":
            g, reg = _find_reg(kernel, g, level, options.target_support)
        else:
            while level > 2 * reg:
                g = _solve_level(kernel, g, level, max(_LOOSE, tolerance)).dual(level)
                level /= 2
        state = _solve_level(kernel, g, float(reg), 0.95 * tolerance)  # the plan's own sums round a little
        coupling = Coupling(place(kernel.plan(state)))
        return OTSolution.of(problem, coupling, options, started=start, iterations=kernel.passes, reg=float(reg))


@dataclass
class _State:
    """A point of the semi-dual: ``T = diag(u) K diag(v)`` has rows a exactly, columns c, and ``v = exp(y)``."""

    g: Tensor  # (m,) the dual the kernel was built with
    y: Tensor  # (m,) log v
    v: Tensor  # (m,)
    u: Tensor  # (n,)
    c: Tensor  # (m,) column sums
    error: float  # L1 distance of c to b
    value: float  # the semi-dual objective, in units of reg, up to what the kernel was built with

    def dual(self, reg: float) -> Tensor:
        """g with log v absorbed, (m,)."""
        return self.g + reg * self.y


class _Kernel:
    """The kernel, its buffer, and the count of passes over it."""

    def __init__(self, problem: OTProblem, max_passes: int):
        self.cost, self.a, self.b = problem.cost, problem.a, problem.b  # (n, m), (n,), (m,)
        self.matrix = problem.cost.new_empty(problem.cost.shape)  # (n, m)
        self.passes, self.max_passes = 0, max_passes

    @property
    def spent(self) -> bool:
        return self.passes >= self.max_passes

    def build(self, g: Tensor, reg: float) -> _State:
        """K = softmax_rows((g - C)/reg), and the state with v = 1."""
        import torch

        for block in row_blocks(*self.cost.shape):
            self.matrix[block] = torch.softmax((g - self.cost[block]).mul_(1 / reg), dim=1)
        return self.state(g, torch.zeros_like(g))

    def state(self, g: Tensor, y: Tensor) -> _State:
        """One pass: u makes the rows exact, and what then lacks in the columns is the error."""
        self.passes += 1
        v = y.exp()
        s = self.matrix @ v  # (n,)
        u = self.a / s
        c = v * (self.matrix.t() @ u)  # (m,)
        value = self.b.double().dot(y.double()) - self.a.double().dot(s.double().log())
        return _State(g, y, v, u, c, (c - self.b).abs().sum().item(), value.item())

    def hessian(self, state: _State, x: Tensor) -> Tensor:
        """(diag(c) - Tᵀ diag(1/a) T) x, (m,) -> (m,): one pass."""
        self.passes += 1
        w = self.matrix @ (state.v * x)  # (n,)
        w.mul_(state.u).mul_(state.u / self.a)
        return state.c * x - state.v * (self.matrix.t() @ w)

    def hessian_diagonal(self, state: _State) -> Tensor:
        """Its diagonal, c_s - Σ_r T_rs²/a_r, kept away from 0; (m,): one pass."""
        self.passes += 1
        weight = state.u * state.u / self.a  # (n,)
        inner = self.b.new_zeros(self.b.shape)  # (m,)
        for block in row_blocks(*self.matrix.shape):
            inner += self.matrix[block].square().t() @ weight[block]
        return (state.c - state.v.square() * inner).maximum(1e-4 * self.b)

    def plan(self, state: _State) -> Tensor:
        """T with exact columns, made in place of the kernel, which is gone afterwards; (n, m)."""
        # A column that underflow left without mass, possible only when the passes ran out, stays as it is.
        lost = state.c < 1e-20 * self.b
        v = state.v * (self.b / state.c.where(~lost, self.b))
        for block in row_blocks(*self.matrix.shape):
            self.matrix[block] *= state.u[block].unsqueeze(1)
            self.matrix[block] *= v
        return self.matrix


def _solve_level(kernel: _Kernel, g: Tensor, reg: float, tolerance: float) -> _State:
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


def _sinkhorn_step(kernel: _Kernel, state: _State) -> _State:
    """v <- v b/c; a column that lost all its mass to underflow comes back over several steps."""
    ratio = kernel.b / state.c.clamp_min(_tiny(state.c))
    return kernel.state(state.g, state.y + ratio.log().clamp_(-20, 20))


def _newton_step(kernel: _Kernel, state: _State, tolerance: float) -> _State | None:
    """A Newton step of the semi-dual by preconditioned conjugate gradients; None if it finds nothing better."""
    residual = kernel.b - state.c  # (m,), also the gradient
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


def _find_reg(kernel: _Kernel, g: Tensor, level: float, target: float) -> tuple[Tensor, float]:
    """The reg whose plan has ``target`` effective support, and a dual to start from there.

    Support grows with reg. Halving (or doubling) reg brackets the target, then log support is interpolated in log reg.
    Loose plans suffice. Where no reg reaches the target (equal rows, target beyond n), the nearest tried one is taken.
    """

    stride = max(1, kernel.cost.shape[1] // 512)  # about 512 columns tell enough while the target is far

    def measure(g: Tensor, reg: float) -> tuple[float, float, Tensor]:
        state = _solve_level(kernel, g, reg, _LOOSE)
        support = effective_support(kernel.matrix[:, ::stride], state.u)
        if stride > 1 and support < 2 * target:
            support = effective_support(kernel.matrix, state.u)
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


def _spread(cost: Tensor) -> tuple[Tensor, float]:
    """The dual for reg -> infinity (column means), and twice the cost's deviation from row plus column effects.

    Above that reg the plan is nearly the product of its marginals, so annealing need not start higher.
    """
    n, _ = cost.shape
    columns = cost.t() @ cost.new_full((n,), 1 / n)  # (m,)
    columns = columns - columns.mean()
    sample = cost[:: -(-n // 256)] - columns  # (at most 256, m)
    sample = sample - sample.mean(1, keepdim=True)
    spread = 2 * sample.square().mean().sqrt().item()
    return columns, max(spread, 1e-6 * sample.abs().max().item(), 1e-6 * columns.abs().max().item()) or 1.0


def _with_mass(problem: OTProblem) -> tuple[OTProblem, Callable[[Tensor], Tensor]]:
    """The problem on the points that have mass, and the function that puts its plan back among the others."""
    rows, columns = problem.a > 0, problem.b > 0  # (n,), (m,)
    if bool(rows.all()) and bool(columns.all()):
        return problem, lambda plan: plan
    inner = OTProblem(problem.cost[rows][:, columns], problem.a[rows], problem.b[columns])

    def place(plan: Tensor) -> Tensor:
        whole = problem.cost.new_zeros(problem.cost.shape)  # (n, m)
        r, s = rows.nonzero(), columns.nonzero().squeeze(1)
        whole[r, s] = plan
        return whole

    return inner, place


def _tiny(x: Tensor) -> float:
    import torch

    return torch.finfo(x.dtype).tiny


SOLVER = Sinkhorn()
