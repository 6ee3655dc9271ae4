"""On a GPU: the device tests, two layers of an 8B model fused, a whole 1.1B model, next to the same on the CPU.

Every case runs in a process of its own and is timed from within: seconds of reading (disk and upload), of computing and
of writing, against its wall time; their sum is larger than that when they overlap. The fastest run counts, so sources
are in the page cache. The GPU's tensors are compared with the CPU's, as long as the ``--minutes`` last. Outputs are not
verified.

Without a GPU it says so and exits with 2. ``--device cpu --small`` tries the script anywhere. Exits with 1 when a test
fails or a bar is missed.

``--no-tests --only opt_deus --minutes 2`` is the part that takes least time.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import COLUMNS, SMALL, Figure, Shape, at_most, fine_tuned, parser, random_checkpoint, report
from run_all import machine_facts
from stages import STAGES, compare

HERE = Path(__file__).resolve().parent
PAIR = Shape(layers=2, hidden=4096, intermediate=14336, heads=32, kv_heads=8, vocabulary=4096)
SMALL_PAIR = Shape(layers=2, hidden=128, intermediate=448, heads=4, kv_heads=2, vocabulary=256)
COST = 1e-4  # relative difference of transport costs
TENSOR = 1e-2  # relative error of a tensor in the Frobenius norm: some units of bfloat16


@dataclass(frozen=True)
class Case:
    """What is computed.

    Attributes:
        name: For the table.
        recipe: With ``{base}``, ``{one}`` and ``{two}`` for models.
        pair: Of the two layers of an 8B model; else of the 1.1B model.
        comparable: Whether tensors, and not only the costs of plans, must be near the CPU's. Between random layers
            many matchings cost almost the same, so that rounding decides which one is the best.
    """

    name: str
    recipe: str
    pair: bool
    comparable: bool = True


_UPSCALE = "base_model: {{base}}\nupscale: {{{{preset: {preset}, insert: {insert}}}}}\n"
_TASKS = """
merge_method: {method}
base_model: {{base}}
models:
  - {{{{model: {{one}}, parameters: {{{{weight: 0.5, density: 0.5}}}}}}}}
  - {{{{model: {{two}}, parameters: {{{{weight: 0.5, density: 0.5}}}}}}}}
"""
CASES = (
    Case("8B pair, opt_deus", _UPSCALE.format(preset="opt_deus", insert="all"), True, comparable=False),
    Case("8B pair, opt_deus_paper", _UPSCALE.format(preset="opt_deus_paper", insert="all"), True),
    Case("1.1B, ties of two fine-tunes", _TASKS.format(method="ties"), False),
    Case("1.1B, dare_ties of two fine-tunes", _TASKS.format(method="dare_ties"), False),
    Case("1.1B, opt_deus", _UPSCALE.format(preset="opt_deus", insert="top_half"), False, comparable=False),
    Case("1.1B, opt_deus_paper", _UPSCALE.format(preset="opt_deus_paper", insert="top_half"), False),
)


def main() -> int:
    options = parser(__doc__, runs=2)
    options.add_argument("--device", default="cuda", help="as for deus-merge (cuda)")
    options.add_argument("--minutes", type=float, default=10, help="when these are over, what is left is left out (10)")
    options.add_argument("--no-tests", action="store_true", help="leave the device tests out")
    options.add_argument("--only", default="", metavar="TEXT", help="only cases with this in their names")
    options.add_argument("--out", type=Path, default=HERE, help="where gpu.json and GPU.md go (benchmarks/)")
    options = options.parse_args()
    if not has_device(options.device):
        import torch

        print(f"gpu: torch {torch.__version__} finds no device {options.device}; needs a CUDA GPU", file=sys.stderr)
        return 2
    bench, cases = _Bench(options), [case for case in CASES if options.only in case.name]
    if not options.no_tests:
        bench.device_tests()
    for case in cases:
        bench.on_device(case)
    for case in cases:
        bench.against_cpu(case)
    return bench.finish()


def has_device(name: str) -> bool:
    """Whether torch can compute there."""
    import torch

    device = torch.device(name)
    return device.type == "cpu" or (torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count())


class _Bench:
    """The runs, their figures, and the time that is left."""

    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.deadline = time.monotonic() + 60 * options.minutes
        self.scratch = options.scratch.resolve()
        self.scratch.mkdir(parents=True, exist_ok=True)
        self.figures: list[Figure] = []
        self.details: dict[str, Any] = {}
        self._models: dict[bool, dict[str, Path]] = {}

    @property
    def left(self) -> float:
        """Seconds."""
        return self.deadline - time.monotonic()

    def device_tests(self) -> None:
        """tests/device with this device: all of them, or a few when the script is only tried."""
        results = self.scratch / "gpu-tests.xml"
        workers = min(8, len(os.sched_getaffinity(0)))
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={results}"]
        command += ["-n", str(workers)]
        command += ["tests/device", "--ignore=tests/device/test_gpu_script.py"]
        if self.options.small:
            command += ["-k", "test_every_output_dtype"]
        device = "cuda:0" if self.options.device == "cuda" else self.options.device
        env = os.environ | {"DEUS_MERGE_TEST_DEVICE": device, "PYTHONPATH": str(HERE.parent)}
        start = time.monotonic()
        try:
            process = subprocess.run(
                command, cwd=HERE.parent, env=env, timeout=self.left, capture_output=True, text=True
            )
        except subprocess.TimeoutExpired:
            self.figures.append(at_most("tests/device: not finished in time", 1, "", 0))
            return
        suite = next(ElementTree.parse(results).getroot().iter("testsuite")).attrib if results.is_file() else {}
        failed = int(suite.get("failures", 1)) + int(suite.get("errors", 0)) or int(process.returncode != 0)
        self.details["tests"] = {k: suite.get(k) for k in ("tests", "skipped")} | {
            "seconds": round(time.monotonic() - start, 1)
        }
        if failed:
            print(process.stdout[-20_000:], file=sys.stderr)
        self.figures.append(at_most(f"tests/device on {device}: failures", failed, "", 0))

    def on_device(self, case: Case) -> None:
        """A case on the device, several times: its time, how its stages overlap, its peak of memory."""
        runs = self._run(case, self.options.device, *(self._out(case, turn) for turn in range(self.options.runs)))
        if not runs:
            self._leave_out(case.name)
            return
        best = min(runs, key=lambda run: run["seconds"])
        self.details[case.name] = {"runs": runs}
        stages = sum(best[stage] for stage in STAGES)
        self.figures += [
            Figure(f"{case.name}: time", best["seconds"], "s"),
            Figure(f"{case.name}: reading + computing + writing over time", stages / best["seconds"], ""),
        ]
        if peak := max(run["peak_gpu_memory"] for run in runs):
            self.figures.append(Figure(f"{case.name}: peak GPU memory", peak / 1e6, "MB"))
        if len(runs) > 1:
            different = len(compare(self._out(case, 0), self._out(case, 1))["different"])
            self.figures.append(at_most(f"{case.name}: tensors with other bytes in a second run", different, "", 0))
        for turn in range(1, self.options.runs):
            shutil.rmtree(self._out(case, turn), ignore_errors=True)

    def against_cpu(self, case: Case) -> None:
        """A case on the CPU, and how far the device's tensors are from the CPU's."""
        ours, expected = self._out(case, 0), self.scratch / "gpu-out-cpu"
        runs = self._run(case, "cpu", expected) if ours.is_dir() else []
        if not runs:
            self._leave_out(f"{case.name}: comparison with the CPU")
            return
        run, found, mine = runs[0], compare(ours, expected), self.details[case.name]["runs"][0]
        self.details[case.name] |= {
            "cpu": run,
            "different": found["different"],
            "largest_error": found["largest_error"],
        }
        tensors = len(found["same"]) + len(found["different"])
        self.figures += [
            Figure(f"{case.name}: tensors with the CPU's bytes", len(found["same"]), "", "", None, tensors, "all"),
            Figure(f"{case.name}: time against the CPU's", mine["seconds"], "s", "", None, run["seconds"], "CPU"),
        ]
        if run["costs"]:
            pairs = zip(mine["costs"], run["costs"], strict=True)
            cost = max(abs(a - b) / abs(b) for a, b in pairs)
            self.figures.append(at_most(f"{case.name}: relative difference of transport costs", cost, "", COST))
        if case.comparable:
            what = f"{case.name}: largest relative error of a tensor"
            self.figures.append(at_most(what, found["largest_error"], "", TENSOR))
        shutil.rmtree(expected)

    def finish(self) -> int:
        """Write gpu.json and GPU.md.

        Returns:
            The exit code.
        """
        shutil.rmtree(self.scratch / "gpu-out", ignore_errors=True)
        self.options.out.mkdir(parents=True, exist_ok=True)
        self.options.json = self.options.json or self.options.out / "gpu.json"
        machine = machine_facts() | {"device": device_name(self.options.device)}
        report("gpu", self.figures, self.options, {"machine": machine, **self.details})
        rows = "".join("| " + " | ".join(figure.cells()) + " |\n" for figure in self.figures)
        (self.options.out / "GPU.md").write_text(
            f"# On a GPU\n\nWritten by `{' '.join(['python benchmarks/gpu.py', *_shown(sys.argv[1:])])}`."
            " Every run is in `gpu.json`.\n\n"
            + ", ".join(f"{key} {value}" for key, value in machine.items())
            + f"\n\n| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|\n{rows}"
        )
        return int(any(figure.met is False for figure in self.figures))

    def _run(self, case: Case, device: str, *folders: Path) -> list[dict[str, Any]]:
        """Runs into these folders, in a process of their own; none when the time is over."""
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)
            folder.parent.mkdir(exist_ok=True)
        recipe = self.scratch / "gpu-recipe.yml"
        recipe.write_text(case.recipe.format(**self._checkpoints(case.pair)))
        command = [sys.executable, HERE / "stages.py", device, recipe, *folders]
        try:
            process = subprocess.run(command, timeout=max(self.left, 0.001), capture_output=True, text=True)
        except subprocess.TimeoutExpired:
            for folder in folders:
                shutil.rmtree(folder, ignore_errors=True)
            return []
        if process.returncode:
            sys.exit(f"{case.name} on {device} exited with {process.returncode}:\n{process.stderr[-4000:]}")
        return json.loads(process.stdout.splitlines()[-1])

    def _out(self, case: Case, turn: int) -> Path:
        return self.scratch / "gpu-out" / f"{CASES.index(case)}-{turn}"

    def _checkpoints(self, pair: bool) -> dict[str, Path]:
        if pair not in self._models:
            small = self.options.small
            shape = (SMALL_PAIR if small else PAIR) if pair else (SMALL if small else Shape())
            base = random_checkpoint(self.scratch, shape)
            tuned = {} if pair else {name: fine_tuned(base, shape, i) for i, name in enumerate(("one", "two"), 1)}
            self._models[pair] = {"base": base, **tuned}
        return self._models[pair]

    def _leave_out(self, what: str) -> None:
        self.details.setdefault("left out for lack of time", []).append(what)
        print(f"left out for lack of time: {what}", file=sys.stderr)


def _shown(arguments: list[str]) -> list[str]:
    """The arguments without those that say where files are."""
    shown, hidden = [], False
    for argument in arguments:
        if hidden or argument in ("--scratch", "--out", "--json"):
            hidden = not hidden
        else:
            shown.append(argument)
    return shown


def device_name(device: str) -> str:
    """The device and, of a GPU, its model."""
    import torch

    return f"{device}: {torch.cuda.get_device_name(device)}" if torch.device(device).type == "cuda" else device


if __name__ == "__main__":
    sys.exit(main())
