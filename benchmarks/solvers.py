"""How our transport solvers compare with their peers: seconds, marginal error, transport cost.

    python benchmarks/solvers.py                          # n = 576, 1536; random and planted rows
    python benchmarks/solvers.py --sizes 576 1536 4096    # emd and POT take minutes at 4096
    python benchmarks/solvers.py --checkpoint MODEL --layers 20 28

Peers: POT's ``ot.bregman.sinkhorn_log`` (float64 NumPy and float32 torch) with our reg and tolerance, POT's ``ot.emd``
and SciPy's ``linear_sum_assignment``. ``x peer`` is the peer's time over ours: above 1, ours is faster.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from deus_merge.discover import plugins
from deus_merge.errors import SolverError
from deus_merge.ot.costs import cost_matrix
from deus_merge.ot.coupling import Coupling
from deus_merge.ot.problem import OTProblem, OTSolver, SolverOptions

#: setting -> (arguments of the cost, reg): the paper's numbers, and this project's defaults
SETTINGS = {
    "paper": ({"cost_scale": "none", "unit": False}, 0.06),
    "ours": ({"cost_scale": "max", "unit": True}, "auto"),
}
_ROW = "{:<26} {:<22} {:>9} {:>10} {:>11} {:>7} {:>9} {:>7}"


def rows(n: int, d: int, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Two sets of n rows: independent, or a permutation of each other with noise of their own size."""
    g = torch.Generator().manual_seed(n)
    x = torch.randn(n, d, generator=g)
    if kind == "random":
        return x, torch.randn(n, d, generator=g)
    return x, x[torch.randperm(n, generator=g)] + torch.randn(n, d, generator=g)


def problems(options: argparse.Namespace) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """(name, rows of A, rows of B)."""
    for n in options.sizes:
        for kind in ("random", "planted"):
            yield f"{kind} {n}", *rows(n, options.width, kind)
    if options.checkpoint:
        from safetensors import safe_open

        stored = {}
        for file in sorted(Path(options.checkpoint).glob("*.safetensors")):
            opened = safe_open(file, "pt")
            stored |= dict.fromkeys(opened.keys(), opened)
        for layer in options.layers:
            for part in ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj"):
                names = [f"model.layers.{i}.{part}.weight" for i in (layer, layer + 1)]
                yield f"layer {layer} {part.split('.')[1]}", *(stored[k].get_tensor(k).float() for k in names)


def peers(solver: str, problem: OTProblem, reg: float, options: argparse.Namespace) -> dict[str, Callable[[], object]]:
    """What the field would call instead: label -> a call that returns the plan (n, m)."""
    import ot
    from scipy.optimize import linear_sum_assignment

    cost, (n, m) = problem.cost, problem.cost.shape
    a64, b64, cost64 = (x.double().numpy() for x in (problem.a, problem.b, cost))

    def sinkhorn_log(*arrays: object) -> object:
        # Its threshold is the L2 column error; L1 is at most √m of that.
        threshold = options.tolerance / m**0.5
        return ot.bregman.sinkhorn_log(*arrays, reg, numItermax=options.peer_iterations, stopThr=threshold)

    def assignment() -> object:
        plan = torch.zeros(n, m)
        plan[linear_sum_assignment(cost.numpy())] = 1 / n
        return plan

    return {
        "sinkhorn": {
            "POT sinkhorn_log f64": lambda: sinkhorn_log(a64, b64, cost64),
            "POT sinkhorn_log f32": lambda: sinkhorn_log(problem.a, problem.b, cost),
        },
        "emd": {"POT emd": lambda: ot.emd(a64 / a64.sum(), b64 / b64.sum(), cost64, numItermax=10**9)},
        "assignment": {"SciPy": assignment},
    }.get(solver, {})


def report(name: str, solver: str, plan: Coupling, problem: OTProblem, seconds: float, *more: object) -> None:
    """One line of the table; ``more``: passes, reg, x peer."""
    cost, error = plan.transport_cost(problem.cost), plan.marginal_error(problem.a, problem.b)
    cells = [name, solver, f"{seconds:.3f}", f"{error:.1e}", f"{cost:.5f}", *more, "", "", ""]
    print(_ROW.format(*cells[:8]), flush=True)


def compare(name: str, solver: OTSolver, problem: OTProblem, reg: object, options: argparse.Namespace) -> None:
    """Our solver, then its peers."""
    try:
        solution = solver.solve(problem, SolverOptions(reg=reg, tolerance=options.tolerance))
    except SolverError as refusal:
        print(f"{name}: {solver.name}: {refusal.message}")
        return
    told = (solution.iterations or "", "" if solution.reg is None else f"{solution.reg:.5f}")
    report(name, solver.name, solution.coupling, problem, solution.seconds, *told)
    if options.no_peers:
        return
    for label, call in peers(solver.name, problem, solution.reg, options).items():
        start = time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            plan = call()
        seconds = time.perf_counter() - start
        ratio = f"{seconds / solution.seconds:.1f}"
        report(name, "  " + label, Coupling(torch.as_tensor(plan).float()), problem, seconds, "", told[1], ratio)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="*", default=[576, 1536])
    parser.add_argument("--width", type=int, default=576, help="length of the rows")
    parser.add_argument("--checkpoint", help="a folder of safetensors with Llama names: its rows join")
    parser.add_argument("--layers", type=int, nargs="*", default=[20])
    parser.add_argument("--settings", nargs="*", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--tolerance", type=float, default=1e-4)
    parser.add_argument("--peer-iterations", type=int, default=2000, help="limit of sinkhorn_log")
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--solvers", nargs="*", help="default: all")
    options = parser.parse_args()
    solvers = plugins("deus_merge.ot.solvers", "SOLVER")
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, tolerance {options.tolerance:g}")
    print(_ROW.format("problem", "solver", "seconds", "L1 error", "<T, C>", "passes", "reg", "x peer"))
    for solver in solvers.values():  # the first call imports their libraries
        solver.solve(OTProblem.uniform(torch.rand(8, 8)))
    for name, x, y in problems(options):
        for setting in options.settings:
            arguments, reg = SETTINGS[setting]
            start = time.perf_counter()
            problem = OTProblem.uniform(cost_matrix(x, y, **arguments))
            print(f"{name}, {setting}: cost matrix {time.perf_counter() - start:.3f} s")
            for solver in options.solvers or solvers:
                compare(f"{name}, {setting}", solvers[solver], problem, reg, options)


if __name__ == "__main__":
    main()
