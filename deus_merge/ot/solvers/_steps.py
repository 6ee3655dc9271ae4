"""How the entropic solvers solve their semi-dual: annealing, Sinkhorn steps, Newton steps, and the search for a reg.

1. *Annealing*: reg starts at the spread of the cost and is halved to its goal, every level starting from the dual of
   the level before (Schmitzer 2019, arXiv 1610.06519, section 3).
2. *Sinkhorn steps* while they converge fast: ``u = p / Kv``, ``log v += k log(q/c)``, ``k = rho/(rho + reg)``; log v is
   absorbed into g before it grows.
3. *Newton steps* where they do not: the semi-dual's Hessian ``diag(c + reg/rho q) - k Tᵀ diag(1/p) T`` is solved by
   conjugate gradients, preconditioned by its own diagonal (Newton after Sinkhorn: Tang et al. 2024, arXiv 2401.12253).
   The diagonal makes it fast: for plans near a permutation it holds almost all of the Hessian.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...core.errors import SolverError
from ..coupling import Coupling, row_blocks
from ..problem import OTProblem, SolverOptions
from ._semidual import Kernel, State, tiny

if TYPE_CHECKING:
    from torch import Tensor

_LOOSE = 0.02  # L1 marginal error that suffices before reg is halved, and to measure the support
_QUICK = 0.6  # a Sinkhorn step that leaves less than this share of the error is worth repeating
_CG_STEPS = 30  # conjugate gradient steps of one Newton step
_AHEAD = 4  # of these, how many an accelerator does for one read, where a pass takes less time than the read
_SMALL = 1 << 24  # entries of a kernel whose passes are that short
_LONGEST = 10.0  # no Newton step changes an entry of log v by more
_ABSORB = 30.0  # |log v| above which it is absorbed into g and the kernel is built again
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
        if state.longest > _ABSORB:
            state = kernel.build(state.dual(reg), reg)
        wait -= 1
        if state.error > tolerance and state.error > _QUICK * before and wait < 0:
            moved = _newton_step(kernel, state, tolerance)
            # After a direction that rounding spoilt, the next one would be spoilt too: some plain steps first.
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
    x, longest = _conjugate_gradients(kernel, state, tolerance)
    if not 0 < longest < math.inf:
        return None
    # Nearly decoupled columns get entries of any length, where the quadratic model means nothing. They are cut one by
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


def _conjugate_gradients(kernel: Kernel, state: State, tolerance: float) -> tuple[Tensor, float]:
    """The direction of a Newton step, (m,), and its largest absolute entry.

    Steps that are done ahead of a read stop to have an effect where the iteration would have ended, so the result does
    not depend on how many there are.
    """
    import torch

    residual = state.q - state.c  # (m,), also the gradient
    goal = max(min(0.5, math.sqrt(state.error)) * state.error, 0.3 * tolerance)
    diagonal = kernel.hessian_diagonal(state)
    x = residual.new_zeros(residual.shape)
    z = residual / diagonal
    direction, rz = z, residual.dot(z)
    going = torch.ones((), dtype=torch.bool, device=x.device)
    start, done = kernel.passes, 0
    ahead = steps_ahead(x.device.type, kernel.shape[0] * kernel.shape[1])
    while True:
        count = going.new_zeros((), dtype=torch.int64)
        left = max(1, min(ahead, _CG_STEPS - done, kernel.max_passes - kernel.passes))
        for _ in range(left):
            product = kernel.hessian(state, direction)
            count = count + going
            curvature = direction.dot(product)
            going = going & (curvature > 0)
            length = rz / curvature
            x = torch.where(going, x + length * direction, x)
            residual = torch.where(going, residual - length * product, residual)
            going = going & ~(residual.abs().sum() < goal)
            z = residual / diagonal
            rz, previous = residual.dot(z), rz
            direction = z + (rz / previous) * direction
        shifted = x - x.dot(kernel.b)  # a constant shift of log v changes nothing
        used, more, longest = torch.stack([t.double() for t in (count, going, shifted.abs().max())]).tolist()
        done += int(used)
        kernel.passes = start + done
        if not more or kernel.spent or done >= _CG_STEPS:
            return shifted, longest


def steps_ahead(device: str, entries: int) -> int:
    """How many conjugate gradient steps to do for one read, on a device of this type, with this many kernel entries."""
    return _AHEAD if device != "cpu" and entries <= _SMALL else 1


def _find_reg(kernel: Kernel, g: Tensor, level: float, target: float) -> tuple[Tensor, float]:
    """The reg whose plan has ``target`` effective support, and a dual to start from there.

    Support grows with reg. Halving (or doubling) reg brackets the target, then log support is interpolated in log reg.
    Loose plans suffice. Where no reg reaches the target (equal rows, target beyond n), the nearest tried one is taken.
    """

    stride = max(1, kernel.shape[1] // 512)  # about 512 columns suffice while the target is far

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
    read = torch.stack([sample.square().mean().sqrt(), sample.abs().max(), columns.abs().max()])  # (3,)
    deviation, largest, largest_column = read.tolist()
    return columns, max(2 * deviation, 1e-6 * largest, 1e-6 * largest_column) or 1.0


def mean_cost(problem: OTProblem) -> float:
    """Σ a_r b_s |C_rs|."""
    total = problem.a.new_zeros(()).double()
    for rows, cost in problem.blocks():
        a, found = problem.a[rows].double(), total.new_zeros(())  # (r,), ()
        for part in row_blocks(*cost.shape):
            found += a[part].dot((cost[part].abs() @ problem.b).double())
        total += found
    return total.item()


@dataclass(frozen=True)
class Placement:
    """The points that have mass, among all points; of a problem where all have mass, all.

    Attributes:
        rows, columns: (n,) and (m,) bool; None if all have mass.
    """

    rows: Tensor | None = None
    columns: Tensor | None = None

    @classmethod
    def of(cls, problem: OTProblem) -> Placement:
        return cls() if problem.marginals.positive else cls(problem.a > 0, problem.b > 0)

    def take(self, problem: OTProblem) -> OTProblem:
        """The problem on the points that have mass."""
        if self.rows is None or self.columns is None:
            return problem
        cost = problem.matrix[self.rows][:, self.columns]
        return OTProblem(cost, problem.a[self.rows], problem.b[self.columns])

    def place(self, plan: Coupling) -> Coupling:
        """A plan between the points that have mass, among all of them; the other columns are unmatched."""
        if self.rows is None or self.columns is None:
            return plan
        matrix = plan.matrix
        whole = matrix.new_zeros(len(self.rows), len(self.columns))  # (n, m)
        whole[self.rows.nonzero(), self.columns.nonzero().squeeze(1)] = matrix
        unmatched = ~self.columns  # (m,)
        if plan.unmatched is not None:
            unmatched[self.columns] = plan.unmatched
        return Coupling(whole, unmatched)
