"""Runs a plan: read ahead, merge on the device, write behind; then verify, and only then the folder gets its name."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..checkpoint.header import read_small
from ..checkpoint.index import INDEX
from ..checkpoint.layout import index_json
from ..checkpoint.output_folder import OutputFolder
from ..checkpoint.shards import ShardWriter
from ..core.errors import CheckpointError, DeusMergeError, MachineError, VerifyError, json_text
from ..core.units import ITEMSIZE, format_size
from ..methods.base import AT_ONCE, TensorTask
from ..plan.blocks import BlockPlan
from ..plan.types import Plan
from ..recipe.writer import dump_recipe
from ..report.lineage import ancestors
from ..report.manifest import MANIFEST, RECIPE, manifest, plan_sources, sealed
from ..report.model_card import model_card
from ..verify import Verification, verify
from .compute import Maker, Piece, results_of
from .preflight import RunOptions, check_sources, preflight

if TYPE_CHECKING:
    import torch


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
    began = time.monotonic()
    ready = preflight(plan, out, options)
    output = ready.output
    if ready.complete:
        output.tidy()
        for block in plan.blocks:
            on_block(block, True)
        hint = "make it anew with --overwrite"
        verification = _passed(verify(output.out, quick=True), out, hint) if options.verify else None
        return verification, plan.warnings + ready.warnings
    past, unknown_past = ancestors(plan)
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
        told = ready.told | {"seconds": round(time.monotonic() - began, 3)}
        record = manifest(plan, _write_files(plan, output, past, options.model_card), diagnostics, told, past)
        verification = None
        if options.verify:
            found = verify(output.folder, quick=True, record=record, sources=list(plan_sources(plan)))
            verification = _passed(found, out, "the output was not put in place")
        output.put(MANIFEST, sealed(record, verification.checksums if verification else None))
        output.finish()
    return verification, (
        *plan.warnings,
        *ready.warnings,
        *unknown_past,
        *output.notes,
        *_convergence(plan, diagnostics),
    )


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
        self.writer = writer
        self.results = results_of(plan, device, options.seed, limited=options.max_memory is not None)
        self.maker = Maker(plan, device, options.seed, plan.block_memory(options.max_memory), self.results)
        self.diagnostics: dict[int, list[dict]] = {}
        self._ahead = stack.enter_context(ThreadPoolExecutor(1, "read-ahead"))
        self._behind = stack.enter_context(ThreadPoolExecutor(1, "write-behind"))
        self._workers = _workers(stack) if device and device.type == "cpu" else None
        self._writing: Future | None = None
        self._coming = iter(computing)
        self._next = self._read_ahead()

    def block(self, block: BlockPlan) -> list[dict]:
        """Make one block; returns what its method told, and those of documents' blocks that were made for it."""
        copies = [(t.task.name, t.inputs[t.source]) for t in block.tensors if t.action == "copy"]
        if copies:
            self.writer.copy_many(copies)
        for t in block.tensors:
            if t.action == "zeros":
                self.writer.zeros(t.task.name)
        told: list[dict] = []
        if block.computes:
            loaded, self._next = self._next.result(), self._read_ahead()
            separate = self.maker.separate(block) if self._workers else []
            for piece in self.maker.casts(block) if separate else self.maker.make(block, told, loaded):
                self._write(piece)
            self._wait()
            told += self._separately(block, separate, loaded) if separate else []
        for result in self.results.values():
            told += result.take_told()
        self.diagnostics[block.index] = told
        return told

    def _separately(self, block: BlockPlan, tasks: Sequence[TensorTask], loaded: dict) -> list[dict]:
        """Make outputs that do not depend on each other, a thread each; what their method told. A single one, too: runs
        are so short that threads that shared them would mostly wait for each other."""

        def one(task: TensorTask) -> list[dict]:
            told: list[dict] = []
            for piece in self.maker.merged(block, told, loaded, only=task):
                self._put(piece)
            return told

        return [line for lines in self._workers(one, tasks) for line in lines]

    def _write(self, piece: Piece) -> None:
        """Hand to the writing thread; at most one tensor waits, so that memory stays bound."""
        self._wait()
        self._writing = self._behind.submit(self._put, piece)

    def _put(self, piece: Piece) -> None:
        import torch

        at = None if piece.start is None else piece.start * ITEMSIZE[piece.planned.dtype]
        flat = piece.tensor.detach().to("cpu").contiguous().view(-1).view(torch.uint8)
        self.writer.write(piece.planned.task.name, memoryview(flat.numpy()), at=at)

    def _wait(self) -> None:
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.result()

    def _read_ahead(self) -> Future | None:
        """Begin with the next block that computes something."""
        block = next(self._coming, None)
        return self._ahead.submit(self.maker.load, block) if block else None


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


def _passed(verification: Verification, out: Path, hint: str) -> Verification:
    """The checks of a folder that is, or will be, ``out``.

    Raises:
        VerifyError: one failed.
    """
    if failed := verification.failed:
        raise VerifyError(f"{failed[0].name}: {failed[0].detail}", where=out, hint=hint)
    return replace(verification, folder=out)


def _check_same_sources(plan: Plan) -> None:
    try:
        check_sources(plan)
    except CheckpointError as error:
        raise VerifyError(
            "a source has changed during the run", where=error.where, hint="start over with --overwrite"
        ) from None


def _write_files(plan: Plan, output: OutputFolder, past: Sequence[Mapping], card: bool) -> dict[str, bytes]:
    """Everything beside the weights and the manifest."""
    recipe = dump_recipe(plan.recipe)
    files = {name: c if isinstance(c, bytes) else read_small(c) for name, c in plan.files.items()}
    if len(plan.shards) > 1:
        files[INDEX] = index_json(plan.shards)
    files["config.json"] = (json_text(plan.config, indent=2) + "\n").encode()
    files[RECIPE] = recipe.encode()
    if card:
        files["README.md"] = model_card(plan, recipe, past).encode()
    for name, content in files.items():
        output.put(name, content)
    return files


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
