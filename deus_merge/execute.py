"""Runs a plan: read ahead, merge on the device, write behind; then verify, and only then the folder gets its name."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from copy import copy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from . import __version__
from .alignment import merge_aligned
from .checkpoint.layout import index_json
from .checkpoint.reader import INDEX
from .checkpoint.shards import ShardWriter
from .checkpoint.system import free_space
from .checkpoint.writer import OutputFolder
from .errors import CheckpointError, DeusMergeError, PlanError, VerifyError
from .method import AT_ONCE, Made, TensorTask
from .plan import BlockPlan, Plan, PlannedTensor
from .recipe import methods
from .recipe_yaml import dump_recipe
from .report.card import model_card
from .report.manifest import MANIFEST, RECIPE, manifest
from .units import ITEMSIZE, dtype_name, format_size, torch_dtype
from .verify import Verification, verify

if TYPE_CHECKING:
    import torch

_CAST_BYTES = 64 << 20  # of a tensor that is only cast, this much is alive at once
_SLACK = 16 << 20  # bytes of disk for everything beside the weights


@dataclass(frozen=True)
class RunOptions:
    """How to run, as opposed to what.

    Attributes:
        device: ``auto`` (CUDA where there is one), ``cpu``, ``cuda`` or ``cuda:N``.
        max_memory: Bytes the process may take: plans then work in row blocks; too few are refused.
        resume: Go on with an interrupted run.
        overwrite: Replace an existing output, once the new one is whole.
        verify: Check the result before it gets its name.
        seed: For methods that draw random numbers.
        threads: CPU threads for arithmetic; None for torch's own choice.
    """

    device: str = "auto"
    max_memory: int | None = None
    resume: bool = False
    overwrite: bool = False
    verify: bool = True
    seed: int = 0
    threads: int | None = None


def preflight(plan: Plan, out: Path, options: RunOptions) -> None:
    """Everything that can be known to go wrong, before a byte is written.

    Raises:
        PlanError: no room on the disk, too little memory allowed, OUT in or around a source, no such device.
    """
    if not re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", options.device):
        raise PlanError("unknown device", where="--device", expected="auto, cpu, cuda or cuda:N", got=options.device)
    place = out.resolve()
    for model in plan.models:
        source = model.checkpoint.folder.resolve()
        if place == source or source in place.parents or place in source.parents:
            raise PlanError(
                "the output and a source must not contain each other",
                where=out,
                expected="a folder beside the models",
                got=f"source {source}",
            )
    OutputFolder(out, plan_hash=plan.hash, overwrite=options.overwrite).check_place()
    if options.max_memory is not None and plan.least_memory > options.max_memory:
        raise PlanError(
            "the plan needs more memory than allowed",
            where="--max-memory",
            expected=f"at least {format_size(plan.least_memory)}",
            got=format_size(options.max_memory),
        )
    needed = plan.bytes_written + _SLACK
    if not options.resume and (free := free_space(out)) < needed:
        raise PlanError("too little space on the disk", where=out, expected=format_size(needed), got=format_size(free))
    if any(b.computes for b in plan.blocks):
        _device(options.device)


def execute(
    plan: Plan, out: Path, options: RunOptions, on_block: Callable[[BlockPlan, bool], None]
) -> tuple[Verification | None, tuple[str, ...]]:
    """Carry out a plan.

    Args:
        plan: What to do.
        out: The output folder; it appears when it is whole and verified.
        options: How.
        on_block: Called after every block, with whether an earlier run had already finished it.

    Returns:
        The verification (None if switched off), and all warnings.

    Raises:
        DeusMergeError: as `preflight`; or a tensor that cannot be merged; VerifyError when the result is wrong.
    """
    preflight(plan, out, options)
    computes = any(b.computes for b in plan.blocks)
    device = _device(options.device) if computes else None
    identity = {
        "deus_merge": __version__,
        "device": device.type if device else "none",
        "threads": _set_threads(options.threads) if computes else 0,
        "seed": options.seed,
        "sources": [_stamp(m.checkpoint.files) for m in plan.models],
    }
    output = OutputFolder(
        out, plan_hash=plan.hash, identity=identity, overwrite=options.overwrite, resume=options.resume
    )
    with _told_how_to_resume(output), output:
        writer = output.shards(plan.shards)
        with ExitStack() as stack:
            left = [block for block in plan.blocks if str(block.index) not in output.finished]
            run = _Run(plan, writer, device, options, [block for block in left if block.computes], stack)
            for block in plan.blocks:
                resumed = str(block.index) in output.finished
                if not resumed:
                    output.record(str(block.index), {"tensors": run.block(block)})
                on_block(block, resumed)
        diagnostics = {int(index): line["tensors"] for index, line in output.finished.items()} | run.diagnostics
        warnings = plan.warnings + tuple(output.notes) + _convergence(plan, diagnostics)
        told = {key: identity[key] for key in ("device", "threads", "seed")}
        _write_files(plan, output.folder, diagnostics, told)
        verification = replace(verify(output.folder, quick=True), folder=out) if options.verify else None
        if verification and not verification.passed:
            failed = next(c for c in verification.checks if c.passed is False)
            raise VerifyError(f"{failed.name}: {failed.detail}", where=out, hint="the output was not put in place")
        output.finish()
    return verification, warnings + tuple(n for n in output.notes if n not in warnings)


class _Run:
    """One run's moving parts: the block being read ahead, the one being merged, the tensor being written behind; and
    on a CPU the workers that make the tensors of a block side by side, where the method lets them."""

    def __init__(
        self,
        plan: Plan,
        writer: ShardWriter,
        device: torch.device | None,
        options: RunOptions,
        computing: Sequence[BlockPlan],
        stack: ExitStack,
    ):
        self.plan, self.writer, self.device, self.seed = plan, writer, device, options.seed
        self.memory = plan.block_memory(options.max_memory)
        self.diagnostics: dict[int, list[dict]] = {}
        self._ahead = stack.enter_context(ThreadPoolExecutor(1, "read-ahead"))
        self._behind = stack.enter_context(ThreadPoolExecutor(1, "write-behind"))
        self._workers = _workers(stack) if device and device.type == "cpu" else None
        self._writing: Future | None = None
        self._coming = iter(computing)
        self._next = self._read_ahead()

    def block(self, block: BlockPlan) -> list[dict]:
        """Make one block; returns what its method told."""
        copies = [(t.task.name, t.inputs[t.source]) for t in block.tensors if t.action == "copy"]
        if copies:
            self.writer.copy_many(copies)
        for t in block.tensors:
            if t.action == "zeros":
                self.writer.zeros(t.task.name)
        told: list[dict] = []
        if block.computes:
            loaded, self._next = self._next.result(), self._read_ahead()
            for t in block.tensors:
                if t.action == "cast":
                    self._cast(block, t)
            if any(t.action == "merge" for t in block.tensors):
                told = self._merge(block, _Inputs(self, block, loaded))
            self._wait()
        self.diagnostics[block.index] = told
        return told

    def _merge(self, block: BlockPlan, inputs: _Inputs) -> list[dict]:
        method = methods()[block.method]
        tasks = [t.task for t in block.tensors if t.action == "merge"]
        try:
            if block.align:
                return self._take(block, merge_aligned(method, inputs, block.align))
            if self._workers is None or not method.tensorwise or len(tasks) == 1:
                return self._take(block, method.merge(inputs))
            tasks.sort(key=lambda task: -math.prod(task.shape))  # the largest first: no worker ends long before another
            told = self._workers(lambda task: self._take(block, method.merge(inputs.of(task)), behind=False), tasks)
            return [line for lines in told for line in lines]
        except DeusMergeError as error:
            place = inputs.names(str(error.where)) or error.where
            error.where = f"{block.title}: {place}" if place else block.title
            raise

    def _take(self, block: BlockPlan, outputs: Iterator[Made], behind: bool = True) -> list[dict]:
        """Write what a method makes; returns what it told."""
        planned = {t.task.name: t for t in block.tensors}
        told = []
        for made in outputs:
            if made.diagnostics is not None:
                told.append({"tensor": made.task.name, **made.diagnostics})
            if made.tensor is not None:
                target = planned[made.task.name]
                at = None if made.start is None else made.start * ITEMSIZE[target.dtype]
                self._write(target, made.tensor, at, behind)
        return told

    def _cast(self, block: BlockPlan, planned: PlannedTensor) -> None:
        """Another dtype and nothing else: a slice of rows at a time."""
        info = planned.inputs[planned.source]
        checkpoint = self.plan.models[block.sources[planned.source].model].checkpoint
        if not info.shape:
            self._write(planned, checkpoint.read(info.name))
            return
        rows = max(1, _CAST_BYTES // max(1, info.nbytes // max(1, info.shape[0])))
        row_bytes = math.prod(info.shape[1:]) * ITEMSIZE[planned.dtype]
        for start in range(0, info.shape[0], rows):
            piece = checkpoint.slice(info.name, start, min(start + rows, info.shape[0]))
            self._write(planned, piece, start * row_bytes)

    def _write(self, planned: PlannedTensor, tensor: torch.Tensor, at: int | None = None, behind: bool = True) -> None:
        """Cast once and write, or let the writing thread do it: at most one tensor waits, so that memory is bounded."""
        import torch

        tensor = tensor.to(torch_dtype(planned.dtype))
        ends = torch.stack(torch.aminmax(tensor)) if tensor.numel() else tensor  # NaN is both, and this is faster
        if not bool(torch.isfinite(ends).all()):
            raise CheckpointError(
                f"{planned.task.name} becomes NaN or infinity",
                where=planned.inputs[0].file,
                expected=f"finite values that fit {dtype_name(planned.dtype)}",
                hint="look for NaN in the sources, or choose a wider dtype",
            )
        flat = tensor.detach().to("cpu").contiguous().view(-1).view(torch.uint8)
        write = partial(self.writer.write, planned.task.name, memoryview(flat.numpy()), at=at)
        if not behind:
            write()
            return
        self._wait()
        self._writing = self._behind.submit(write)

    def _wait(self) -> None:
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.result()

    def _read_ahead(self) -> Future | None:
        """Begin with the next block that computes something."""
        block = next(self._coming, None)
        return self._ahead.submit(self._load, block) if block else None

    def _load(self, block: BlockPlan) -> dict[tuple[str, int], torch.Tensor]:
        """Start reading what the block will merge: into the kernel's cache, or onto the device."""
        loaded = {}
        if methods()[block.method].learns:  # its inputs are a whole model
            return loaded
        for t in block.tensors:
            if t.action != "merge" or t.task.slot:
                continue
            for i, info in enumerate(t.inputs):
                checkpoint = self.plan.models[block.sources[i].model].checkpoint
                if self.device is None or self.device.type == "cpu":
                    checkpoint.prefetch([info.name])
                else:
                    loaded[t.task.role, i] = checkpoint.read(info.name).to(self.device)
        return loaded


class _Inputs:
    """A block as its method sees it (`method.Block`)."""

    def __init__(self, run: _Run, block: BlockPlan, loaded: dict):
        self.tasks: list[TensorTask] = [t.task for t in block.tensors]
        self.base, self.memory = block.base, run.memory
        self._run, self._block, self._loaded = run, block, loaded
        self._inputs = {t.task.role: t.inputs for t in block.tensors}

    def of(self, task: TensorTask) -> _Inputs:
        """The same block with this output alone."""
        part = copy(self)
        part.tasks = [task]
        return part

    def read(self, role: str, source: int) -> torch.Tensor:
        if (role, source) in self._loaded:
            return self._loaded.pop((role, source))
        model = self._run.plan.models[self._block.sources[source].model]
        return model.checkpoint.read(self._inputs[role][source].name).to(self._run.device)

    def names(self, role: str) -> str | None:
        """The stored tensors of a role, for messages."""
        if role not in self._inputs:
            return None
        stored = list(dict.fromkeys(i.name for i in self._inputs[role]))
        return f"{role} ({' and '.join(stored) if len(stored) < 4 else f'{stored[0]} to {stored[-1]}'})"

    def generator(self, task: TensorTask, source: int) -> torch.Generator:
        import torch

        digest = hashlib.sha256(f"{self._run.seed} {source} {task.name}".encode()).digest()
        return torch.Generator(self._run.device).manual_seed(int.from_bytes(digest[:8], "little", signed=True))


def _write_files(plan: Plan, folder: Path, diagnostics: Mapping[int, list[dict]], told: Mapping[str, object]) -> None:
    """Everything beside the weights: the manifest last, since it knows the others' digests."""
    recipe = dump_recipe(plan.recipe)
    files = {name: c if isinstance(c, bytes) else c.read_bytes() for name, c in plan.files.items()}
    if len(plan.shards) > 1:
        files[INDEX] = index_json(plan.shards)
    files["config.json"] = (json.dumps(plan.config, indent=2, ensure_ascii=False) + "\n").encode()
    files[RECIPE] = recipe.encode()
    record = json.dumps(manifest(plan, files, diagnostics, told), indent=1, ensure_ascii=False) + "\n"
    files |= {"README.md": model_card(plan, recipe).encode(), MANIFEST: record.encode()}
    for name, content in files.items():
        (folder / name).write_bytes(content)


@contextmanager
def _told_how_to_resume(output: OutputFolder) -> Iterator[None]:
    """Whatever stops the run, say what is kept."""
    try:
        yield
    except BaseException as error:
        if hint := output.resume_hint:
            if isinstance(error, DeusMergeError) and not isinstance(error, VerifyError):
                error.hint = f"{error.hint}; {hint}" if error.hint else hint
            else:
                error.__notes__ = [*getattr(error, "__notes__", ()), hint]
        raise


def _convergence(plan: Plan, diagnostics: Mapping[int, list[dict]]) -> tuple[str, ...]:
    """One warning for all plans that missed their tolerance."""
    missed = [d for lines in diagnostics.values() for d in lines if d.get("converged") is False]
    if not missed:
        return ()
    worst = max(missed, key=lambda d: d["marginal_error"])
    return (
        f"{len(missed)} transport plans did not reach the tolerance; the worst is {worst['tensor']} with an L1 marginal"
        f" error of {worst['marginal_error']:.2g} after {worst['iterations']} iterations: raise reg or max_iterations",
    )


def _device(name: str) -> torch.device:
    import torch

    device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise PlanError(
            "no such CUDA device", where="--device", expected=f"{torch.cuda.device_count()} devices", got=name
        )
    if device.type == "cuda":  # plans need all of float32's digits
        torch.backends.cuda.matmul.allow_tf32 = False
    return device


def _set_threads(threads: int | None) -> int:
    import torch

    if threads:
        torch.set_num_threads(threads)
    return torch.get_num_threads()


def _workers(stack: ExitStack) -> Callable | None:
    """A ``map`` that calls its function in several threads, which share torch's among them; None for one thread."""
    import torch

    threads = torch.get_num_threads()
    count = min(AT_ONCE, threads)
    if count == 1:
        return None
    # In a thread of its own this sets how many threads that one uses, and the number for those to come.
    pool = stack.enter_context(
        ThreadPoolExecutor(count, "merge", initializer=lambda: torch.set_num_threads(threads // count))
    )

    def map_(function, items):
        try:
            return list(pool.map(function, items))
        finally:
            torch.set_num_threads(threads)

    return map_


def _stamp(files: tuple[Path, ...]) -> list:
    return [[f.name, os.stat(f).st_size, os.stat(f).st_mtime_ns] for f in files]
