"""Runs a plan: read ahead, merge on the device, write behind; then verify, and only then the folder gets its name."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from . import __version__
from .checkpoint.header import read_small
from .checkpoint.layout import index_json
from .checkpoint.reader import INDEX
from .checkpoint.shards import ShardWriter
from .checkpoint.system import free_space
from .checkpoint.writer import OutputFolder
from .errors import DeusMergeError, PlanError, VerifyError, json_text
from .making import Maker, Piece, results_of
from .plan import BlockPlan, Plan
from .recipe_yaml import dump_recipe
from .report.card import model_card
from .report.lineage import ancestors
from .report.manifest import MANIFEST, RECIPE, manifest, plan_sources, sealed
from .units import ITEMSIZE, format_size
from .verify import Verification, verify

if TYPE_CHECKING:
    import torch

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
        model_card: Write a README.md.
    """

    device: str = "auto"
    max_memory: int | None = None
    resume: bool = False
    overwrite: bool = False
    verify: bool = True
    seed: int = 0
    threads: int | None = None
    model_card: bool = True


def preflight(plan: Plan, out: Path, options: RunOptions) -> None:
    """Everything that can be known to go wrong, before a byte is written.

    Raises:
        PlanError: no room on the disk, too little memory allowed, OUT in or around a source, no such device.
    """
    if not re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", options.device):
        raise PlanError("unknown device", where="--device", expected="auto, cpu, cuda or cuda:N", got=options.device)
    output = OutputFolder(out, plan_hash=plan.hash, overwrite=options.overwrite)
    for folder in (f for model in plan.models for f in model.checkpoint.folders):
        output.check_apart(folder)
    output.check_place()
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
    began = time.monotonic()
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
        past, unknown_past = ancestors(plan)
        warnings = plan.warnings + unknown_past + tuple(output.notes) + _convergence(plan, diagnostics)
        told = {key: identity[key] for key in ("device", "threads", "seed")}
        told["seconds"] = round(time.monotonic() - began, 3)
        record = manifest(plan, _write_files(plan, output.folder, past, options.model_card), diagnostics, told, past)
        verification = None
        if options.verify:
            sources = list(plan_sources(plan))
            verification = replace(verify(output.folder, quick=True, record=record, sources=sources), folder=out)
            if not verification.passed:
                failed = verification.failed[0]
                raise VerifyError(f"{failed.name}: {failed.detail}", where=out, hint="the output was not put in place")
        checksums = verification.checksums if verification else None
        (output.folder / MANIFEST).write_bytes(sealed(record, checksums))
        output.finish()
    return verification, warnings + tuple(n for n in output.notes if n not in warnings)


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
        self.writer = writer
        self.results = results_of(plan, device, options.seed, limited=options.max_memory is not None)
        self.maker = Maker(plan, device, options.seed, plan.block_memory(options.max_memory), self.results)
        self.diagnostics: dict[int, list[dict]] = {}
        self._ahead = stack.enter_context(ThreadPoolExecutor(1, "read-ahead"))
        self._behind = stack.enter_context(ThreadPoolExecutor(1, "write-behind"))
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
            for piece in self.maker.make(block, told, loaded):
                self._write(piece)
            self._wait()
        for result in self.results.values():
            told += result.take_told()
        self.diagnostics[block.index] = told
        return told

    def _write(self, piece: Piece) -> None:
        """Hand to the writing thread; at most one tensor waits, so that memory stays bound."""
        import torch

        at = None if piece.start is None else piece.start * ITEMSIZE[piece.planned.dtype]
        flat = piece.tensor.detach().to("cpu").contiguous().view(-1).view(torch.uint8)
        self._wait()
        name = piece.planned.task.name
        self._writing = self._behind.submit(self.writer.write, name, memoryview(flat.numpy()), at=at)

    def _wait(self) -> None:
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.result()

    def _read_ahead(self) -> Future | None:
        """Begin with the next block that computes something."""
        block = next(self._coming, None)
        return self._ahead.submit(self.maker.load, block) if block else None


def _write_files(plan: Plan, folder: Path, past: Sequence[Mapping], card: bool) -> dict[str, bytes]:
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
        (folder / name).write_bytes(content)
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


def _stamp(files: tuple[Path, ...]) -> list:
    return [[f.name, os.stat(f).st_size, os.stat(f).st_mtime_ns] for f in files]
