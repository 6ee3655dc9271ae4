"""Whole recipes on a device, in a process of its own: what the tests of this folder call and compare.

The device is ``sim:0`` (`simulated`) unless the environment variable DEUS_MERGE_TEST_DEVICE names another one, such as
``cuda:0``. The simulated device must give the CPU's bytes. CUDA adds in another order, so there every tensor must come
within `tolerance` of the CPU's; transfers are only counted on the simulated device.

Last run on CUDA with an NVIDIA H200 and torch 2.11: all tests passed but the one of calibration, which is newer.
"""

from __future__ import annotations

import os
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

import simulated
import torch
from simulated import Transfers
from support import weights

from deus_merge import api
from deus_merge.checkpoint.reader import Checkpoint
from deus_merge.checkpoint.shards import ShardWriter
from deus_merge.core.plugins import plugins
from deus_merge.ot.costs import PointCost
from deus_merge.ot.problem import OTProblem
from deus_merge.plan.types import Plan
from deus_merge.run.block_runner import run_blocks

DEVICE = os.environ.get("DEUS_MERGE_TEST_DEVICE", simulated.DEVICE)
IS_SIMULATED = simulated.DEVICE == DEVICE

#: relative error of a tensor, in the Frobenius norm, on a device that adds in another order than the CPU
TOLERANCE = 1e-3
#: where more must be allowed: lesa learns, which makes differences larger, from eigenvectors, of which those to nearly
#: the same eigenvalue can be turned
TOLERANCES = {"lesa": 1.0}


@dataclass
class Result:
    """A run on one device.

    Attributes:
        folder: Where its shards are.
        diagnostics: What methods and solvers reported, without times.
        transfers: What crossed between host and device; empty on devices that do not count.
        reads: Size in bytes of every stored tensor that was read as a whole, in order.
        most_reads: How often the tensor was read that was read most often.
        written: Size in bytes of everything that was computed and written, in order.
        writers: Names of the threads that wrote it.
    """

    folder: Path
    diagnostics: list[dict] = field(default_factory=list)
    transfers: Transfers = field(default_factory=Transfers)
    reads: list[int] = field(default_factory=list)
    most_reads: int = 0
    written: list[int] = field(default_factory=list)
    writers: set[str] = field(default_factory=set)

    @property
    def plans(self) -> list[dict]:
        """Diagnostics of transport plans."""
        return [line for line in self.diagnostics if "transport_cost" in line]


def run_recipe(recipe: Path, out: Path, device: str, seed: int = 0, minimum_memory: bool = False) -> Result:
    """Compute a recipe's blocks on a device and write its shards into a new folder.

    Args:
        recipe: The recipe's file; models are named by absolute paths.
        out: The folder to make.
        device: As torch names it.
        seed: Of random numbers.
        minimum_memory: Work in the least memory that the plan can do with.
    """
    plan = api.plan(recipe)
    result = Result(out)
    with _recorded(result), _writer(plan, out, result) as writer:
        run_blocks(
            plan,
            range(len(plan.blocks)),
            writer,
            device=torch_device(device),
            seed=seed,
            max_memory=plan.minimum_memory if minimum_memory else None,
            on_block=lambda block, record: result.diagnostics.extend(
                {key: value for key, value in line.items() if key != "seconds"} for line in record["tensors"]
            ),
        )
    return result


def read_ahead(recipe: Path, out: Path, device: str, patience: float = 20.0) -> list[tuple[int, int]]:
    """Uploads before each computed block is finished, when nothing but the reading thread can go on: (uploads so far,
    uploads that its own inputs and those of the next block make)."""
    plan = api.plan(recipe)
    computed = [block for block in plan.blocks if block.computes]
    needed = [sum(len(o.inputs) for o in block.outputs if o.computed) for block in computed]
    seen: list[tuple[int, int]] = []
    result = Result(out)

    def finished(block, lines) -> None:
        if not block.computes:
            return
        wanted = sum(needed[: len(seen) + 2])
        deadline = time.monotonic() + patience
        while len(transfers.uploads) < wanted and time.monotonic() < deadline:
            time.sleep(0.001)
        seen.append((len(transfers.uploads), wanted))

    with simulated.recording() as transfers, _writer(plan, out, result) as writer:
        run_blocks(plan, range(len(plan.blocks)), writer, device=torch_device(device), on_block=finished)
    return seen


def solve_points(solver: str, rows: int, columns: int, device: str) -> tuple[list[int], float, Transfers]:
    """A solver's plan between random points.

    Args:
        solver: Its name.
        rows, columns: Points on either side, and numbers of each.
        device: Where to solve.

    Returns:
        The row that goes to each column most of all, the transport cost, and what crossed between host and device.
    """
    random = torch.Generator().manual_seed(0)
    place = torch_device(device)
    x, y = (torch.randn(rows, columns, generator=random).to(place) for _ in range(2))  # (n, d) each
    with simulated.recording() as transfers:
        cost = PointCost(x, y)
        solution = plugins("deus_merge.ot.solvers", "SOLVER")[solver].solve(OTProblem.uniform(cost))
    return solution.coupling.matrix.argmax(0).tolist(), solution.transport_cost, transfers


@contextmanager
def _recorded(result: Result) -> Iterator[None]:
    """Count transfers and reads."""
    read, times = Checkpoint.read, Counter()

    def counting(checkpoint: Checkpoint, name: str) -> torch.Tensor:
        result.reads.append(checkpoint.tensors[name].nbytes)
        times[checkpoint.folder, name] += 1
        return read(checkpoint, name)

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(Checkpoint, "read", counting))
        result.transfers = stack.enter_context(simulated.recording())
        yield
    result.most_reads = max(times.values(), default=0)


@contextmanager
def _writer(plan: Plan, out: Path, result: Result) -> Iterator[ShardWriter]:
    out.mkdir()
    writer = ShardWriter(out, plan.shards)
    write = writer.write

    def recording(name: str, data: Any, *, at: int | None = None) -> None:
        result.writers.add(threading.current_thread().name)
        result.written.append(data.nbytes)
        write(name, data, at=at)

    with mock.patch.object(writer, "write", recording):
        yield writer
    writer.close()


def torch_device(name: str) -> torch.device:
    """The device of a name, the simulated one among them."""
    return simulated.register() if name == simulated.DEVICE else torch.device(name)


def differences(ours: Path, expected: Path, tolerance: float | None) -> list[str]:
    """Tensors of two folders that are not the same.

    Args:
        ours, expected: Folders of shards.
        tolerance: None: the bytes must be the same; else the largest relative error.
    """
    if tolerance is None:
        files = [{p.name: p.read_bytes() for p in folder.iterdir()} for folder in (ours, expected)]
        if files[0] == files[1]:
            return []
    got, want = weights(ours), weights(expected)
    if got.keys() != want.keys():
        return sorted(got.keys() ^ want.keys())
    if tolerance is None:
        return [name for name in want if not torch.equal(got[name], want[name])] or ["the files' headers"]
    errors = {n: (got[n].double() - want[n].double()).norm() / want[n].double().norm().clamp_min(1e-30) for n in want}
    return [f"{name}: {float(error):.3g}" for name, error in errors.items() if not error <= tolerance]


def tolerance(recipe: str) -> float | None:
    """How far the tensors of a recipe, given as text, may be from the CPU's on the tests' device; None: not at all."""
    if IS_SIMULATED:
        return None
    return max((value for name, value in TOLERANCES.items() if name in recipe), default=TOLERANCE)


class DeviceProcess:
    """A process that computes on the tests' device; the tests' own process stays as it is. A context manager."""

    def __init__(self) -> None:
        context = get_context("spawn")
        self._pool = ProcessPoolExecutor(1, context, initializer=torch.set_num_threads, initargs=(1,))

    def __enter__(self) -> DeviceProcess:
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown()

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """A function's result there; function and arguments must pickle.

        Raises:
            AssertionError: the function raised, with its traceback.
        """
        failed, result = self._pool.submit(_call, function, args, kwargs).result()
        assert not failed, f"on {DEVICE}:\n{result}"
        return result


def _call(function: Callable[..., Any], args: tuple, kwargs: dict) -> tuple[bool, Any]:
    try:
        return False, function(*args, **kwargs)
    except Exception:
        return True, traceback.format_exc()


def skip_reason() -> str | None:
    """Why this machine cannot run the device tests; None when it can."""
    if not IS_SIMULATED:
        missing = DEVICE.startswith("cuda") and not torch.cuda.is_available()
        return f"DEUS_MERGE_TEST_DEVICE is {DEVICE}, and torch finds no such device" if missing else None
    return None if simulated.supported() else "the simulated device needs torch 2.10"
