"""Runs a plan: read ahead, merge on the device, write behind; then verify, and only then the folder gets its name."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from .alignment import merge_aligned
from .checkpoint.layout import index_json
from .checkpoint.reader import INDEX
from .checkpoint.shards import ShardWriter
from .checkpoint.writer import OutputFolder
from .errors import CheckpointError, DeusMergeError, MachineError, VerifyError
from .method import TensorTask
from .plan import BlockPlan, Plan, PlannedTensor
from .preflight import RunOptions, check_sources, preflight
from .recipe import methods
from .recipe_yaml import dump_recipe
from .report.card import model_card
from .report.manifest import MANIFEST, RECIPE, manifest
from .units import ITEMSIZE, dtype_name, format_size, torch_dtype
from .verify import Verification, verify

if TYPE_CHECKING:
    import torch

_CAST_BYTES = 64 << 20  # of a tensor that is only cast, this much is alive at once


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
    ready = preflight(plan, out, options)
    output = ready.output
    if ready.complete:
        output.tidy()
        for block in plan.blocks:
            on_block(block, True)
        hint = "make it anew with --overwrite"
        verification = _verified(output.out, out, hint) if options.verify else None
        return verification, plan.warnings + ready.warnings
    with _told_how_to_resume(output), output:
        writer = output.shards(plan.shards)
        kept = {int(index): line["tensors"] for index, line in output.finished.items()}  # before the flushes add to it
        with ExitStack() as stack:
            computing = [block for block in plan.blocks if block.computes and block.index not in kept]
            run = _Run(plan, writer, ready.device, options, computing, stack)
            for block in plan.blocks:
                if block.index not in kept:
                    with _memory_told(block):
                        made = run.block(block)
                    output.record(str(block.index), {"tensors": made})
                on_block(block, block.index in kept)
        _check_same_sources(plan)
        output.flush(wait=False)  # while the result is checked
        diagnostics = kept | run.diagnostics
        _write_files(plan, output, diagnostics, ready.told)
        hint = "the output was not put in place"
        verification = _verified(output.folder, out, hint) if options.verify else None
        output.finish()
    return verification, (*plan.warnings, *ready.warnings, *output.notes, *_convergence(plan, diagnostics))


class _Run:
    """One run's moving parts: the block being read ahead, the one being merged, the tensor being written behind."""

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
        planned = {t.task.name: t for t in block.tensors}
        told = []
        try:
            method = methods()[block.method]
            for made in merge_aligned(method, inputs, block.align) if block.align else method.merge(inputs):
                if made.diagnostics is not None:
                    told.append({"tensor": made.task.name, **made.diagnostics})
                if made.tensor is not None:
                    target = planned[made.task.name]
                    at = None if made.start is None else made.start * ITEMSIZE[target.dtype]
                    self._write(target, made.tensor, at)
        except DeusMergeError as error:
            place = inputs.names(str(error.where)) or error.where
            error.where = f"{block.title}: {place}" if place else block.title
            raise
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

    def _write(self, planned: PlannedTensor, tensor: torch.Tensor, at: int | None = None) -> None:
        """Cast once and hand to the writing thread; at most one tensor waits, so that memory stays bound."""
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
        self._wait()
        self._writing = self._behind.submit(self.writer.write, planned.task.name, memoryview(flat.numpy()), at=at)

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

    def read(self, role: str, source: int) -> torch.Tensor:
        if (role, source) in self._loaded:
            return self._loaded.pop((role, source))
        model = self._run.plan.models[self._block.sources[source].model]
        return model.checkpoint.read(self._inputs[role][source].name).to(self._run.device)

    def names(self, role: str) -> str | None:
        """The stored tensors of a role, for messages."""
        stored = self._inputs.get(role)
        return None if stored is None else f"{role} ({' and '.join(dict.fromkeys(i.name for i in stored))})"

    def generator(self, task: TensorTask, source: int) -> torch.Generator:
        import torch

        digest = hashlib.sha256(f"{self._run.seed} {source} {task.name}".encode()).digest()
        return torch.Generator(self._run.device).manual_seed(int.from_bytes(digest[:8], "little", signed=True))


@contextmanager
def _memory_told(block: BlockPlan) -> Iterator[None]:
    """Too little memory as a MachineError; torch has several ways to say it."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not re.search("out of memory|allocate memory", str(error)):
            raise
        raise MachineError(
            "out of memory",
            where=block.title,
            got=str(error).splitlines()[0] if str(error) else None,
            hint=f"plans work in less with --max-memory; this block was estimated at {format_size(block.workspace())}",
        ) from error


def _verified(folder: Path, out: Path, hint: str) -> Verification:
    """The quick checks of a folder that is, or will be, ``out``.

    Raises:
        VerifyError: one failed.
    """
    verification = replace(verify(folder, quick=True), folder=out)
    if not verification.passed:
        failed = next(c for c in verification.checks if c.passed is False)
        raise VerifyError(f"{failed.name}: {failed.detail}", where=out, hint=hint)
    return verification


def _check_same_sources(plan: Plan) -> None:
    try:
        check_sources(plan)
    except CheckpointError as error:
        raise VerifyError(
            "a source has changed during the run", where=error.where, hint="start over with --overwrite"
        ) from None


def _write_files(
    plan: Plan, output: OutputFolder, diagnostics: Mapping[int, list[dict]], told: Mapping[str, object]
) -> None:
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
        output.put(name, content)


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
