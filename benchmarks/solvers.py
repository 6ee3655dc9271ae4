"""How our transport solvers compare with their peers: seconds, memory, marginal error and transport cost.

    python benchmarks/solvers.py                                   # n = 1536, 4096, 8192, 14336
    python benchmarks/solvers.py --sizes 1536 --problems real      # one size, real rows only

Problems: ``random`` rows, ``planted`` ones (a permutation of each other, with noise of their own size), ``real`` rows
(gate projections of neighbouring layers of SmolLM2-135M, as many layers as n needs) and for assignment ``uniform``
costs without rows. Costs are our defaults: unit rows, Euclidean, divided by the maximum. A solver's time and memory
are those from the rows to the plan; each runs in a process of its own. Peers get the cost matrix that we would make:
POT's ``sinkhorn_log`` (float64 NumPy, float32 torch) with our reg and an L2 threshold that is worth our L1 error, POT's
``sinkhorn_stabilized_unbalanced`` and ``emd``, SciPy's ``linear_sum_assignment``. A peer is stopped at ``--patience``
times our time; it then counts with that time. `emd` is POT's own, so it has no row of its own.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

from common import Figure, parser, report

HERE = Path(__file__)
SIZES = (1536, 4096, 8192, 14336)
PROBLEMS = ("random", "planted", "real", "uniform")
#: solver -> its peers
PEERS = {
    "assignment": ("SciPy", "POT emd"),
    "sinkhorn": ("POT sinkhorn_log f32", "POT sinkhorn_log f64"),
    "unbalanced": ("POT stabilized_unbalanced f32",),
    "progot": (),
}
_EMD_ROWS = 4096  # POT's simplex has a float64 cost and plan of its own


def rows(problem: str, n: int, model: Path):
    """Two sets of n rows, (n, d) each."""
    import torch

    g = torch.Generator().manual_seed(n)
    if problem == "real":
        from safetensors import safe_open

        stored = safe_open(model / "model.safetensors", "pt")
        layers = [stored.get_tensor(f"model.layers.{i}.mlp.gate_proj.weight").float() for i in range(30)]
        return torch.cat(layers[:-1])[:n], torch.cat(layers[1:])[:n]
    x = torch.randn(n, 576, generator=g)
    if problem == "random":
        return x, torch.randn(n, 576, generator=g)
    return x, x[torch.randperm(n, generator=g)] + torch.randn(n, 576, generator=g)


def solve(name: str, problem, options: dict) -> tuple[object, dict]:
    """Our solver, or a peer of ours: the plan, and what it tells."""
    import torch

    from deus_merge.ot.problem import SolverOptions
    from deus_merge.ot.registry import solvers

    ours = solvers().get(name)
    if ours is not None:
        solution = ours.solve(problem, SolverOptions(tolerance=options["tolerance"]))
        return solution.coupling, {"reg": solution.reg, "passes": solution.iterations, "gap": solution.gap}
    import ot
    from scipy.optimize import linear_sum_assignment

    problem = problem.stored()
    cost, reg, m = problem.cost, options["reg"], problem.cost.shape[1]
    wide = [x.double().numpy() for x in (problem.a, problem.b, cost)] if "f32" not in name else None
    many = {"numItermax": 10**9}
    # POT's threshold is the L2 column error; L1 is at most √m of that.
    log = many | {"stopThr": options["tolerance"] / m**0.5}
    call: dict[str, Callable[[], object]] = {
        "SciPy": lambda: linear_sum_assignment(cost.numpy()),
        "POT emd": lambda: ot.emd(wide[0] / wide[0].sum(), wide[1] / wide[1].sum(), wide[2], **many),
        "POT sinkhorn_log f32": lambda: ot.bregman.sinkhorn_log(problem.a, problem.b, cost, reg, **log),
        "POT sinkhorn_log f64": lambda: ot.bregman.sinkhorn_log(*wide, reg, **log),
        "POT stabilized_unbalanced f32": lambda: ot.unbalanced.sinkhorn_stabilized_unbalanced(
            problem.a, problem.b, cost, reg, cost.mean().item(), **many
        ),
    }
    plan = call[name]()
    if name == "SciPy":
        from deus_merge.ot.coupling import PermutationCoupling

        return PermutationCoupling(torch.from_numpy(plan[1]).argsort(), problem.a), {}
    from deus_merge.ot.coupling import Coupling

    return Coupling(torch.as_tensor(plan).float()), {}


def work(task: dict) -> dict:
    """One cell of the table, in this process."""
    import torch

    from deus_merge.ot.costs import PointCost
    from deus_merge.ot.problem import OTProblem

    if task["problem"] == "uniform":
        points = torch.rand(task["n"], task["n"], generator=torch.Generator().manual_seed(task["n"]))
    else:
        points = rows(task["problem"], task["n"], Path(task["model"]))
    if task["solver"].startswith("POT"):
        import ot  # noqa: F401
    import scipy.optimize  # noqa: F401

    with _Watch() as watch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        start = time.perf_counter()
        cost = points if task["problem"] == "uniform" else PointCost(*points, unit=True, cost_scale="max")
        problem = OTProblem.uniform(cost)
        plan, told = solve(task["solver"], problem, task)
        seconds = time.perf_counter() - start
    error = plan.marginal_error(problem.a, problem.b)
    return told | {
        "seconds": seconds,
        "anonymous_mb": watch.peak / 1e6,
        "marginal_error": error,
        "transport_cost": plan.transport_cost(problem.blocks()),
    }


class _Watch(threading.Thread):
    """Samples the anonymous memory of this process: by how much it rises."""

    def __enter__(self) -> _Watch:
        from common import _anonymous

        self._read, self._done, self.daemon = lambda: _anonymous("self"), threading.Event(), True
        self._start, self.peak = self._read(), 0
        self.start()
        return self

    def run(self) -> None:
        while not self._done.wait(0.01):
            self.peak = max(self.peak, self._read() - self._start)

    def __exit__(self, *exc: object) -> None:
        self._done.set()
        self.join()


def cell(task: dict, limit: float | None = None) -> dict:
    """`work` in a process of its own; stopped after ``limit`` seconds."""
    try:
        done = subprocess.run(
            [sys.executable, HERE, "--work", json.dumps(task)], check=True, text=True, stdout=-1, timeout=limit
        )
    except subprocess.TimeoutExpired:
        return {"seconds": limit, "stopped": True}
    return json.loads(done.stdout)


def compare(options: argparse.Namespace) -> Iterator[dict]:
    """Every cell, ours and the peers' in turns."""
    for n in options.sizes:
        for problem in options.problems:
            for solver in options.solvers:
                if problem == "uniform" and solver != "assignment":
                    continue
                task = {"n": n, "problem": problem, "tolerance": options.tolerance, "model": str(options.model)}
                peers = [p for p in PEERS[solver] if p != "POT emd" or n <= _EMD_ROWS]
                for turn in range(options.runs):
                    ours = cell(task | {"solver": solver})
                    yield task | {"solver": solver, "turn": turn} | ours
                    for peer in peers:
                        limit = max(20.0, options.patience * ours["seconds"] + 10)
                        theirs = cell(task | {"solver": peer, "reg": ours["reg"]}, limit)
                        yield task | {"solver": peer, "of": solver, "turn": turn, "ours": ours["seconds"]} | theirs


_ROW = "{:<14} {:<30} {:>8} {:>8} {:>9} {:>10} {:>7}"


def show(done: dict) -> None:
    """One line of the table."""
    stopped = done.get("stopped")
    cells = ["", "", ""] if stopped else [
        f"{done['anonymous_mb']:.0f}", f"{done['marginal_error']:.1e}", f"{done['transport_cost']:.6f}"
    ]  # fmt: skip
    ratio = f"{done['ours'] / done['seconds']:.3f}" if "of" in done else ""
    name = f"  {done['solver']}" if "of" in done else done["solver"]
    seconds = f"{'> ' if stopped else ''}{done['seconds']:.2f}"
    print(_ROW.format(f"{done['problem']} {done['n']}", name, seconds, *cells, ratio), flush=True)


def figures(cells: list[dict]) -> list[Figure]:
    """Ours beside each peer, by problem and size: medians of time, and how the plans compare."""
    found = []
    for first in (c for c in cells if c.get("of") and c["turn"] == 0):
        alike = [c for c in cells if (c["problem"], c["n"]) == (first["problem"], first["n"])]
        mine, theirs = ([c for c in alike if c["solver"] == name] for name in (first["of"], first["solver"]))
        ours, peer = (sorted(c["seconds"] for c in side)[len(side) // 2] for side in (mine, theirs))
        stopped = any(c.get("stopped") for c in theirs)
        what = f"{first['of']}, {first['problem']} n = {first['n']}"
        bar = (first["of"], first["problem"], first["n"]) in {("assignment", "uniform", 8192)} or (
            first["of"] == "sinkhorn" and first["n"] == 4096
        )
        told = ("ratio <= 0.5", ours <= peer / 2) if bar else ("", None)
        found.append(Figure(what, ours, "s", *told, peer, f"{first['solver']}{', stopped' if stopped else ''}"))
        if not stopped:
            found.append(Figure(f"{what}: memory", max(c["anonymous_mb"] for c in mine), "MB", "", None,
                                max(c["anonymous_mb"] for c in theirs), first["solver"]))  # fmt: skip
        if first["solver"] == "SciPy" and not stopped:
            cost, known = mine[0]["transport_cost"], theirs[0]["transport_cost"]
            off = abs(cost - known) / abs(known)
            found.append(Figure(f"{what}: cost, relative difference", off, "", "<= 1e-9", off <= 1e-9))
        elif first["of"] != "assignment" and not stopped:
            found.append(Figure(f"{what}: marginal error", mine[0]["marginal_error"], "", "", None,
                                theirs[0]["marginal_error"], first["solver"]))  # fmt: skip
    gaps = [c["gap"] for c in cells if c.get("gap") is not None]
    if gaps:
        found.append(Figure("assignment: largest proved gap", max(gaps), "", "<= 1e-6", max(gaps) <= 1e-6))
    return found


def main() -> None:
    options = parser(__doc__, runs=1)
    options.add_argument("--sizes", type=int, nargs="+", default=list(SIZES))
    options.add_argument("--problems", nargs="+", choices=PROBLEMS, default=list(PROBLEMS))
    options.add_argument("--solvers", nargs="+", choices=PEERS, default=list(PEERS))
    options.add_argument("--tolerance", type=float, default=1e-4, help="L1 marginal error")
    options.add_argument("--patience", type=float, default=4.0, help="stop a peer at so many times our time")
    options.add_argument("--model", type=Path, help="a converted SmolLM2; by default one is made in the scratch folder")
    options.add_argument("--work", help=argparse.SUPPRESS)
    options = options.parse_args()
    if options.work:
        print(json.dumps(work(json.loads(options.work))))
        return
    if options.small:
        options.sizes = [1100]
    if options.model is None and "real" in options.problems:
        from deus_merge.models.demo import smollm2

        options.model = smollm2(options.scratch.resolve())
    print(_ROW.format("problem", "solver", "seconds", "MB", "L1 error", "<T, C>", "ratio"))
    cells = []
    for done in compare(options):
        cells.append(done)
        show(done)
    report(HERE.stem, figures(cells), options, {"cells": [{k: v for k, v in c.items() if k != "model"} for c in cells]})


if __name__ == "__main__":
    main()
