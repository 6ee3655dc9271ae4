"""Runs a recipe and times how long it reads, computes and writes: ``stages.py DEVICE RECIPE OUT ...``, JSON to stdout.

Stages run in threads of their own, so that their seconds are more than the whole where they overlap. The download from
a GPU is in none of them.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

STAGES = ("reading", "computing", "writing")


def timed_run(recipe: Path, out: Path, device: str) -> dict[str, Any]:
    """Run a recipe in this process.

    Returns:
        Seconds of the whole and of each stage, the peak of GPU memory in bytes (0 on the CPU), and the cost of every
        transport plan.
    """
    import torch

    from deus_merge import api
    from deus_merge.checkpoint.shards import ShardWriter
    from deus_merge.run.compute import BlockComputer

    seconds: dict[str, float] = dict.fromkeys(STAGES, 0.0)
    lock = threading.Lock()

    @contextmanager
    def stage(name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            with lock:
                seconds[name] += time.perf_counter() - start

    def timed(name: str, function: Callable) -> Callable:
        def call(*args, **kwargs):
            with stage(name):
                return function(*args, **kwargs)

        return call

    def timed_steps(name: str, function: Callable) -> Callable:
        """A generator whose every step is timed. A step ends with a check of its values, so the GPU is done by then."""

        def call(*args, **kwargs):
            steps = function(*args, **kwargs)
            while True:
                with stage(name):
                    step = next(steps, None)
                if step is None:
                    return
                yield step

        return call

    plan = api.plan(recipe)
    cuda = torch.device(device).type == "cuda"
    if cuda:
        torch.zeros(1, device=device)  # its start-up is not ours
        torch.cuda.reset_peak_memory_stats(device)
    with ExitStack() as stack:
        for owner, method, name, wrap in (
            (BlockComputer, "load", "reading", timed),
            (BlockComputer, "merge_outputs", "computing", timed_steps),
            (ShardWriter, "write", "writing", timed),
            (ShardWriter, "copy_many", "writing", timed),
        ):
            stack.enter_context(mock.patch.object(owner, method, wrap(name, getattr(owner, method))))
        start = time.perf_counter()
        api.merge(plan, out, api.RunOptions(device=device, verify=False, seed=1))
        whole = time.perf_counter() - start
    manifest = json.loads((out / "deus_merge.json").read_text())
    lines = [d for layer in manifest["layers"] for d in layer["diagnostics"]]
    return {
        "seconds": round(whole, 6),
        **{name: round(value, 6) for name, value in seconds.items()},
        "peak_gpu_memory": torch.cuda.max_memory_allocated(device) if cuda else 0,
        "costs": [line["transport_cost"] for line in lines if "transport_cost" in line],
    }


def compare(ours: Path, expected: Path) -> dict[str, Any]:
    """Two checkpoints, tensor by tensor.

    Returns:
        Names of the tensors with the ``same`` bytes and of the ``different`` ones, and the ``largest_error`` of one,
        relative, in the Frobenius norm.
    """
    import torch

    from deus_merge.checkpoint.reader import Checkpoint

    found: dict[str, Any] = {"same": [], "different": [], "largest_error": 0.0}
    with Checkpoint.open(ours) as one, Checkpoint.open(expected) as two:
        for name in two.tensors:
            a, b = one.read(name), two.read(name)
            same = torch.equal(a.view(torch.uint8), b.view(torch.uint8))
            found["same" if same else "different"].append(name)
            if not same:
                error = float((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30))
                found["largest_error"] = max(found["largest_error"], error)
    return found


if __name__ == "__main__":
    where, file, *folders = sys.argv[1:]
    print(json.dumps([timed_run(Path(file), Path(folder), where) for folder in folders]))
