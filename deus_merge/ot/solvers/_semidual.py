"""The semi-dual of entropic transport and its kernel, which the entropic solvers share; `_steps` solves it.

The dual is one vector g (m,). With the kernel ``K = softmax_rows((g - C)/reg)``, which cannot overflow, the
plan is ``T = diag(u) K diag(v)`` with rows p exactly and columns c; the optimum has c = q. For plans that keep their
marginals p = a and q = b. Where a marginal penalty rho allows others (Chizat et al. 2018, arXiv 1607.05816), they
follow from the dual, up to their common total M, which is the optimal shift of the dual (Séjourné et al. 2022, arXiv
2201.00730) and drops out of all steps:

    log p = log a + reg/(rho + reg) · log Σ_s exp((g_s - C_rs)/reg),   log q = log b - (g - reg log b)/rho

Memory: the cost and the kernel, two n x m buffers; the plan replaces the kernel. Where `SolverOptions.memory` is less,
the kernel is never stored, and of the cost only as much as fits: the rest is computed again on every pass. The plan is
the same bit for bit, and is then stored as its two scalings.

Reads: a pass ends with one read from the device, which brings all numbers that decide how to go on.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..blocks import effective_support, product_blocks, row_blocks, tiny
from ..coupling import Coupling, LazyCoupling
from ..problem import OTProblem, SolverOptions

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

_LOST = 1e-6  # a column of a relaxed plan with a smaller share of its mass counts as unmatched


@dataclass
class State:
    """A point of the semi-dual: ``T = diag(u) K diag(v)`` has rows p exactly, columns c, and ``v = exp(y)``."""

    g: Tensor  # (m,) the dual the kernel was built with
    y: Tensor  # (m,) log v
    v: Tensor  # (m,)
    u: Tensor  # (n,)
    p: Tensor  # (n,) row sums, of total 1
    q: Tensor  # (m,) the column sums that c approaches, of total 1
    c: Tensor  # (m,) column sums
    error: float  # L1 distance of c to q
    longest: float  # the largest absolute value in y
    value: float  # the semi-dual objective, in units of reg, without the constant that g adds
    log_mass: float  # log of the total mass of the plan, by which p and c are divided

    def dual(self, reg: float) -> Tensor:
        """g with log v absorbed, (m,)."""
        return self.g + reg * self.y


class Kernel:
    """The kernel, its buffer if there is room for one, and the count of passes over it.

    Args:
        problem: All of its points have mass.
        options: Only ``max_iterations`` and ``memory`` are used.
        penalty: The weight rho of the marginals' Kullback-Leibler divergence, in units of the cost.
    """

    def __init__(self, problem: OTProblem, options: SolverOptions, penalty: float = math.inf):
        self.shape: tuple[int, int] = (problem.cost.shape[0], problem.cost.shape[1])
        size = self.shape[0] * self.shape[1] * problem.cost.dtype.itemsize
        self._room = math.inf if options.memory is None else options.memory
        self.matrix = problem.a.new_empty(self.shape) if 2 * size <= self._room else None  # (n, m)
        self.penalty = penalty
        self.passes, self.max_passes = 0, options.max_iterations
        self.move(problem)

    def move(self, problem: OTProblem) -> None:
        """Continue with another problem of the same size; the next call must be `build`."""
        self.problem, self.a, self.b = problem, problem.a, problem.b  # (n,), (m,)
        problem.keep(None if self.matrix is not None else int(self._room), disk=True)
        self.g, self.reg = self.b, 1.0  # of the kernel, set by `build`

    @property
    def spent(self) -> bool:
        """Whether the limit of passes is reached."""
        return self.passes >= self.max_passes

    @property
    def damping(self) -> float:
        """k = rho/(rho + reg), the factor of a Sinkhorn step: 1 for plans that keep their marginals."""
        return 1.0 if self.penalty == math.inf else self.penalty / (self.penalty + self.reg)

    def build(self, g: Tensor, reg: float) -> State:
        """K = softmax_rows((g - C)/reg), and the state with v = 1."""
        self.g, self.reg = g, reg
        if self.matrix is not None:
            for block, cost in self.problem.blocks():
                _softmax(cost, g, reg, self.matrix[block])
        if self.penalty < math.inf:
            self._build_relaxed()
        return self.state(g, g.new_zeros(g.shape))

    def state(self, g: Tensor, y: Tensor) -> State:
        """One pass: u gives the rows their sums p, and the error is what the columns then lack."""
        import torch

        self.passes += 1
        v = y.exp()
        s, p = self.a.new_empty(self.a.shape), self.a  # (n,)
        if self.penalty < math.inf:
            p = self.a.new_empty(self.a.shape)
        u, c = self.a.new_empty(self.a.shape), v.new_zeros(v.shape)
        for rows, kernel in self.parts():
            s[rows] = kernel @ v
            if p is not self.a:
                p[rows] = self._row_mass(rows, s[rows])
            u[rows] = p[rows] / s[rows]
            c.addmv_(kernel.t(), u[rows])
        c *= v  # (m,)
        if self.penalty < math.inf:
            return self._relaxed_state(g, y, v, u, p, c)
        value = self.b.double().dot(y.double()) - self.a.double().dot(s.double().log())
        read = ((c - self.b).abs().sum(), y.abs().max(), value)  # () each
        error, longest, value = torch.stack([x.double() for x in read]).tolist()
        return State(g, y, v, u, p, self.b, c, error, longest, value, 0.0)

    def _build_relaxed(self) -> None:
        """The rows' log sums and roughly their total, from which the marginals of a relaxed plan are computed."""
        import torch

        self._log_sums = self.a.new_empty(self.a.shape)  # (n,) log Σ_s exp((g_s - C_rs)/reg)
        for block, cost in self.problem.blocks():
            for part in row_blocks(*cost.shape):
                rows = slice(block.start + part.start, block.start + part.stop)
                self._log_sums[rows] = torch.logsumexp((self.g - cost[part]).mul_(1 / self.reg), dim=1)
        self._rows_at = self.a.new_zeros(()).double()  # ()
        self._rows_at = self._row_mass(slice(None), None).double().logsumexp(0)

    def _row_mass(self, rows: slice, s: Tensor | None) -> Tensor:
        """p of some rows up to a factor of about 1; without s (r,), its log where v = 1."""
        logs = self._log_sums[rows] if s is None else self._log_sums[rows] + s.log()  # (r,)
        logs = self.a[rows].log() + logs * (self.reg / (self.penalty + self.reg)) - self._rows_at
        return logs if s is None else logs.exp_()

    def _relaxed_state(self, g: Tensor, y: Tensor, v: Tensor, u: Tensor, p: Tensor, c: Tensor) -> State:
        """The rows scaled to a total of 1, and the columns that belong to them."""
        import torch

        reg, rho = self.reg, self.penalty
        total = p.double().sum()
        for x in (u, p, c):
            x /= total.to(x.dtype)
        log_b = self.b.double().log()
        log_q = log_b - (g.double() + reg * y.double() - reg * log_b) / rho  # (m,)
        log_columns = log_q.logsumexp(0)
        q = (log_q - log_columns).exp().to(c.dtype)
        read = ((c - q).abs().sum(), y.abs().max(), total.log() + self._rows_at, log_columns)  # () each
        error, longest, log_rows, log_columns = torch.stack([x.double() for x in read]).tolist()
        # The shift x of the dual that makes both totals one: P exp(x / (rho + reg)) = Q exp(-x / rho).
        log_mass = (rho * log_columns + (rho + reg) * log_rows) / (2 * rho + reg)
        value = -(2 * rho / reg + 1) * log_mass  # the dual falls as the mass grows
        return State(g, y, v, u, p, q, c, error, longest, value, log_mass)

    def hessian(self, state: State, x: Tensor) -> Tensor:
        """(diag(c + reg/rho q) - k Tᵀ diag(1/p) T) x, (m,) -> (m,): one pass."""
        self.passes += 1
        vx, weight = state.v * x, self._weight(state)  # (m,), (n,)
        inner = x.new_zeros(x.shape)  # (m,)
        for rows, kernel in self.parts():
            inner.addmv_(kernel.t(), (kernel @ vx).mul_(weight[rows]))
        return self._hessian_plus(state) * x - state.v * inner

    def hessian_diagonal(self, state: State) -> Tensor:
        """Its diagonal with a floor above 0; (m,): one pass."""
        self.passes += 1
        weight = self._weight(state)  # (n,)
        inner = self.b.new_zeros(self.b.shape)  # (m,)
        for rows, kernel in self.parts():
            inner.addmv_(kernel.square().t(), weight[rows])
        floor = (1e-4 * state.q).clamp_min_(tiny(state.q))
        return (self._hessian_plus(state) - state.v.square() * inner).maximum(floor)

    def _weight(self, state: State) -> Tensor:
        """k u²/p, (n,)."""
        weight = state.u * state.u / state.p.clamp_min(tiny(state.p))
        return weight * self.damping

    def _hessian_plus(self, state: State) -> Tensor:
        """c + reg/rho q, (m,)."""
        return state.c if self.penalty == math.inf else state.c + (self.reg / self.penalty) * state.q

    def support(self, state: State, stride: int) -> float:
        """Effective support of the plan, by every ``stride``-th column."""
        return effective_support(k[:, ::stride] * state.u[rows].unsqueeze(1) for rows, k in self.parts())

    def mean_rows(self, state: State, y: Tensor) -> Tensor:
        """The entropic map: every row's mean of the y it goes to, (m, d) -> (n, d). One pass."""
        self.passes += 1
        weighted, means = state.v.unsqueeze(1) * y, y.new_empty(self.shape[0], y.shape[1])  # (m, d), (n, d)
        for rows, kernel in self.parts():
            means[rows] = (kernel @ weighted) / (kernel @ state.v).unsqueeze(1)
        return means

    def plan(self, state: State) -> Coupling:
        """T of total mass 1 with exact columns; a stored kernel is overwritten by the plan."""
        if self.penalty == math.inf:
            # A column that underflow left without mass, possible only when the passes ran out, is not scaled.
            unmatched, lost = None, state.c < 1e-20 * self.b
            v = state.v * (self.b / state.c.where(~lost, self.b))
        else:
            lost = (state.q < _LOST * self.b) | (state.c < _LOST * self.b)  # (m,)
            unmatched = lost if bool(lost.any()) else None
            v = (state.v * (state.q / state.c.where(~lost, 1))).masked_fill_(lost, 0)

        def scale(kernel: Tensor, rows: slice) -> None:
            for part in row_blocks(*kernel.shape):
                kernel[part] *= state.u[rows][part].unsqueeze(1)
                kernel[part] *= v

        if self.matrix is not None:
            scale(self.matrix, slice(None))
            return Coupling(self.matrix, unmatched)

        import torch

        problem, g, reg = self.problem, self.g, self.reg

        def compute() -> Iterator[tuple[slice, Tensor]]:
            scratch = None
            for block, cost in problem.blocks():
                scratch = torch.empty_like(cost) if scratch is None else scratch[: len(cost)]
                _softmax(cost, g, reg, scratch)
                scale(scratch, block)
                yield block, scratch

        return LazyCoupling(self.shape, compute, unmatched)

    def parts(self) -> Iterator[tuple[slice, Tensor]]:
        """The kernel in row blocks, the same blocks whether it is stored or computed again. Blocks that fit the cache
        would save a read each, but synchronise all threads each, which is slow on a busy machine."""
        import torch

        if self.matrix is not None:
            yield from ((rows, self.matrix[rows]) for rows in product_blocks(*self.shape))
        else:
            scratch = None
            for rows, cost in self.problem.blocks():
                scratch = torch.empty_like(cost) if scratch is None else scratch[: len(cost)]
                _softmax(cost, self.g, self.reg, scratch)
                yield rows, scratch


def _softmax(cost: Tensor, g: Tensor, reg: float, out: Tensor) -> None:
    """softmax_rows((g - C)/reg) of some rows, (r, m)."""
    import torch

    logits = None
    for part in row_blocks(*cost.shape):
        logits = torch.empty_like(cost[part]) if logits is None else logits[: part.stop - part.start]
        torch.sub(g, cost[part], out=logits).mul_(1 / reg)
        torch.softmax(logits, 1, out=out[part])
