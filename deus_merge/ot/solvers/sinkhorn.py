"""Entropic optimal transport that stays finite and converges at small regularisation, in torch on any device.

The dual is kept as one vector g (m,). With the kernel ``K = softmax_rows((g - C)/reg)``, which cannot overflow, the
plan is ``T = diag(u) K diag(v)``, and every step below is a product with K or Kᵀ:

1. *Annealing*: reg starts at the spread of the cost and is halved to its goal, every level starting from the last
   one's dual (Schmitzer 2019, arXiv 1610.06519, section 3).
2. *Sinkhorn steps* while they are quick: ``u = a / Kv``, ``v = b / Kᵀu``; log v is absorbed into g before it grows.
3. *Newton steps* where they are not: the semi-dual's Hessian ``diag(Tᵀ1) - Tᵀ diag(1/a) T`` is solved by conjugate
   gradients, preconditioned by its own diagonal (the use of Newton after Sinkhorn: Tang et al. 2024, arXiv 2401.12253).
   The diagonal is what makes it quick: for plans near a permutation it holds almost all of the Hessian.

Memory: the cost and the kernel, two n x m buffers; the plan is made in the kernel's place. Where `SolverOptions.memory`
is less, the kernel is never stored and as much of the cost as fits: the rest is made again on every pass, and the plan,
which is the same bit for bit, stays as its two scalings.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...errors import SolverError
from ..coupling import Coupling, LazyCoupling, effective_support, row_blocks
from ..problem import OTProblem, OTSolution, SolverOptions

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

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
    needs_points = False

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
        kernel = _Kernel(inner, options)
        g, level = _spread(inner)  # the dual in the limit of large reg, and where to start
        if reg == "auto":
            g, reg = _find_reg(kernel, g, level, options.target_support)
        else:
            while level > 2 * reg:
                g = _solve_level(kernel, g, level, max(_LOOSE, tolerance)).dual(level)
                level /= 2
        state = _solve_level(kernel, g, float(reg), 0.95 * tolerance)  # the plan's own sums round a little
        coupling = place(kernel.plan(state, float(reg)))
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
    """The kernel, its buffer if there is room for one, and the count of passes over it."""

    def __init__(self, problem: OTProblem, options: SolverOptions):
        self.problem, self.a, self.b = problem, problem.a, problem.b  # (n,), (m,)
        self.shape = problem.cost.shape
        size = self.shape[0] * self.shape[1] * problem.cost.dtype.itemsize
        room = math.inf if options.memory is None else options.memory
        self.matrix = self.a.new_empty(self.shape) if 2 * size <= room else None  # (n, m)
        problem.keep(None if self.matrix is not None else int(room))
        self.g, self.reg = self.b, 1.0  # what the kernel is built with
        self.passes, self.max_passes = 0, options.max_iterations

    @property
    def spent(self) -> bool:
        return self.passes >= self.max_passes

    def build(self, g: Tensor, reg: float) -> _State:
        """K = softmax_rows((g - C)/reg), and the state with v = 1."""
        self.g, self.reg = g, reg
        if self.matrix is not None:
            for block, cost in self.problem.blocks():
                self._softmax(cost, out=self.matrix[block])
        return self.state(g, g.new_zeros(g.shape))

    def state(self, g: Tensor, y: Tensor) -> _State:
        """One pass: u makes the rows exact, and what then lacks in the columns is the error."""
        self.passes += 1
        v = y.exp()
        s, u, c = self.a.new_empty(self.a.shape), self.a.new_empty(self.a.shape), v.new_zeros(v.shape)
        for rows, kernel in self.parts():
            s[rows] = kernel @ v
            u[rows] = self.a[rows] / s[rows]
            c.addmv_(kernel.t(), u[rows])
        c *= v  # (m,)
        value = self.b.double().dot(y.double()) - self.a.double().dot(s.double().log())
        return _State(g, y, v, u, c, (c - self.b).abs().sum().item(), value.item())

    def hessian(self, state: _State, x: Tensor) -> Tensor:
        """(diag(c) - Tᵀ diag(1/a) T) x, (m,) -> (m,): one pass."""
        self.passes += 1
        vx, weight = state.v * x, state.u * state.u / self.a  # (m,), (n,)
        inner = x.new_zeros(x.shape)  # (m,)
        for rows, kernel in self.parts():
            inner.addmv_(kernel.t(), (kernel @ vx).mul_(weight[rows]))
        return state.c * x - state.v * inner

    def hessian_diagonal(self, state: _State) -> Tensor:
        """Its diagonal, c_s - Σ_r T_rs²/a_r, kept away from 0; (m,): one pass."""
        self.passes += 1
        weight = state.u * state.u / self.a  # (n,)
        inner = self.b.new_zeros(self.b.shape)  # (m,)
        for rows, kernel in self.parts():
            inner.addmv_(kernel.square().t(), weight[rows])
        return (state.c - state.v.square() * inner).maximum(1e-4 * self.b)

    def support(self, state: _State, stride: int) -> float:
        """Effective support of the plan, by every ``stride``-th column."""
        return effective_support(k[:, ::stride] * state.u[rows].unsqueeze(1) for rows, k in self.parts())

    def plan(self, state: _State, reg: float) -> Coupling:
        """T with exact columns; a stored kernel becomes the plan, and is gone."""
        # A column that underflow left without mass, possible only when the passes ran out, stays as it is.
        lost = state.c < 1e-20 * self.b
        v = state.v * (self.b / state.c.where(~lost, self.b))

        def scale(kernel: Tensor, rows: slice) -> None:
            for part in row_blocks(*kernel.shape):
                kernel[part] *= state.u[rows][part].unsqueeze(1)
                kernel[part] *= v

        if self.matrix is not None:
            scale(self.matrix, slice(None))
            return Coupling(self.matrix)

        def make() -> Iterator[tuple[slice, Tensor]]:
            for block, cost in self.problem.blocks():
                kernel = self._softmax(cost, out=torch.empty_like(cost))  # (r, m)
                scale(kernel, block)
                yield block, kernel

        import torch

        return LazyCoupling(self.shape, make)

    def parts(self) -> Iterator[tuple[slice, Tensor]]:
        """The kernel in row blocks that fit the cache."""
        if self.matrix is not None:
            for rows in row_blocks(*self.shape):
                yield rows, self.matrix[rows]
            return
        for block, cost in self.problem.blocks():
            for part in row_blocks(*cost.shape):
                rows = slice(block.start + part.start, block.start + part.stop)
                yield rows, self._softmax(cost[part])

    def _softmax(self, cost: Tensor, out: Tensor | None = None) -> Tensor:
        """softmax_rows((g - C)/reg) of some rows, (r, m)."""
        import torch

        out = torch.empty_like(cost) if out is None else out
        for part in row_blocks(*cost.shape):
            out[part] = torch.softmax((self.g - cost[part]).mul_(1 / self.reg), dim=1)
        return out


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

    stride = max(1, kernel.shape[1] // 512)  # about 512 columns tell enough while the target is far

    def measure(g: Tensor, reg: float) -> tuple[float, float, Tensor]:
        state = _solve_level(kernel, g, reg, _LOOSE)
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


def _spread(problem: OTProblem) -> tuple[Tensor, float]:
    """The dual for reg -> infinity (column means), and twice the cost's deviation from row plus column effects.

    Above that reg the plan is nearly the product of its marginals, so annealing need not start higher.
    """
    import torch

    n, m = problem.cost.shape
    columns, sample = problem.b.new_zeros(m), []
    stride = -(-n // 256)
    for block, cost in problem.blocks():
        columns += cost.t() @ cost.new_full((len(cost),), 1 / n)  # (m,)
        sample.append(cost[-block.start % stride :: stride])
    columns = columns - columns.mean()
    sample = torch.cat(sample) - columns  # (at most 256, m)
    sample = sample - sample.mean(1, keepdim=True)
    spread = 2 * sample.square().mean().sqrt().item()
    return columns, max(spread, 1e-6 * sample.abs().max().item(), 1e-6 * columns.abs().max().item()) or 1.0


def _with_mass(problem: OTProblem) -> tuple[OTProblem, Callable[[Coupling], Coupling]]:
    """The problem on the points that have mass, and the function that puts its plan back among the others."""
    rows, columns = problem.a > 0, problem.b > 0  # (n,), (m,)
    if bool(rows.all()) and bool(columns.all()):
        return problem, lambda plan: plan
    problem = problem.stored()
    inner = OTProblem(problem.cost[rows][:, columns], problem.a[rows], problem.b[columns])

    def place(plan: Coupling) -> Coupling:
        whole = problem.cost.new_zeros(problem.cost.shape)  # (n, m)
        r, s = rows.nonzero(), columns.nonzero().squeeze(1)
        whole[r, s] = plan.matrix
        return Coupling(whole)

    return inner, place


def _tiny(x: Tensor) -> float:
    import torch

    return torch.finfo(x.dtype).tiny


SOLVER = Sinkhorn()
