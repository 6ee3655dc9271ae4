"""Runs a plan in one process: makes its blocks, verifies the result, and only then gives the folder its name."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..checkpoint.header import read_small
from ..checkpoint.index import INDEX
from ..checkpoint.layout import index_json
from ..checkpoint.output_folder import OutputFolder
from ..core.errors import CheckpointError, SolverError, TrainingError, VerifyError, add_hint, json_text
from ..core.text import some_of
from ..plan.blocks import BlockPlan
from ..plan.types import Plan
from ..recipe.references import ORIGINAL
from ..recipe.writer import as_written, dump_recipe
from ..report.block_times import total_seconds
from ..report.known_sources import remember
from ..report.lineage import ancestors
from ..report.manifest import MANIFEST, RECIPE, Manifest, read_manifest
from ..report.manifest_parts import BlockSeconds, Calibration, Growth
from ..report.model_card import model_card
from ..report.plan_manifest import manifest_of, plan_sources
from ..report.shareable import shared_path, shared_recipe
from ..verify import Verification, verify
from .block_runner import BlockRecord, is_record
from .device import threads_kept
from .engines import FinishedPieces, Job, OnFraction, engine_of
from .events import OnEvent, unheard
from .preflight import Calibrator, RunOptions, preflight, processes_of

#: what methods reported, by the index of the block
Diagnostics = Mapping[int, Sequence[Mapping[str, Any]]]


@dataclass(frozen=True)
class Outcome:
    """A plan that was carried out.

    Attributes:
        verification: The result of the checks; None if they were switched off.
        warnings: All warnings.
        calibration: The record of the calibration; None where the plan has none.
        times: What its blocks took their time for, all together; None where the output was there already.
    """

    verification: Verification | None
    warnings: tuple[str, ...]
    calibration: Calibration | None = None
    times: BlockSeconds | None = None


@threads_kept()
def execute(
    plan: Plan,
    out: Path,
    options: RunOptions,
    on_block: Callable[[BlockPlan, bool], None],
    calibrator: Calibrator | None = None,
    made: FinishedPieces | None = None,
    on_fraction: OnFraction | None = None,
    on_event: OnEvent = unheard,
) -> Outcome:
    """Carry out a plan.

    Args:
        plan: The plan.
        out: The output folder; it appears when it is whole and verified.
        options: Device, resume, overwrite, verification.
        on_block: Called once for every block when it is finished, with whether an earlier run had done so: those first.
        calibrator: What calibrates the output, where the plan has a calibration.
        made: The finished pieces of all blocks, where workers have made them.
        on_fraction: As for `run_blocks`.
        on_event: Called when a block begins and ends, and with what happens to workers.

    Returns:
        The verification, all warnings, and the record of the calibration.

    Raises:
        DeusMergeError: as `preflight`; or a tensor that cannot be merged; VerifyError when the result is wrong.
    """
    began = time.monotonic()
    ready = preflight(plan, out, options, calibrator, made)
    output = ready.output
    if ready.complete:
        output.tidy()
        for block in plan.blocks:
            on_block(block, True)
        hint = "write it again with --overwrite"
        verification = passed(verify(output.out, quick=True), out, hint) if options.verify else None
        record = read_manifest(output.out).calibration if calibrator else None
        return Outcome(verification, plan.warnings + ready.warnings, record)
    past, unknown_past = ancestors(plan)
    with _resume_hints(output), output:
        writer = output.shards(plan.shards, made.files if made else {}, link=calibrator is None)
        earlier = ((index, r) for index, r in output.finished.items() if index.isdigit() and is_record(r))
        records: dict[int, Any] = {int(index): record for index, record in earlier}
        missing = [block.index for block in plan.blocks if block.index not in records]
        for block in plan.blocks:
            if block.index in records:
                on_block(block, True)

        def finished(block: BlockPlan, record: BlockRecord) -> None:
            records[block.index] = record
            output.record(str(block.index), record)
            on_block(block, made is not None)

        device = str(ready.device) if ready.device else None
        limits = ready.threads, options.max_memory
        job = Job(plan, missing, writer, device, options.seed, *limits, on_fraction, on_event)
        with _unchanged_sources(plan):
            (made or engine_of(processes_of(options))).run(job, finished)
        diagnostics = {index: record["tensors"] for index, record in sorted(records.items())}
        times = {index: record["seconds"] for index, record in records.items()}
        output.flush(wait=False)  # while the result is checked
        seconds = time.monotonic() - began + (made.seconds if made else 0.0)
        run_record = ready.run_record | {"seconds": round(seconds, 3)}
        files = other_files(plan, output.out, past, options)
        for name, content in files.items():
            output.put(name, content)
        manifest = manifest_of(plan, files, diagnostics, times, run_record, past)
        if made:
            manifest = replace(manifest, warnings=(*manifest.warnings, *made.warnings))
        if calibrator is not None:
            output.flush()  # every block is on the disk before one of them is changed
            manifest = calibrator.run(output, writer, manifest)
        verification = None
        if options.verify:
            sources = list(plan_sources(plan))
            found = verify(output.folder, quick=True, manifest=manifest, sources=sources, received=writer.received)
            verification = passed(found, out, "the output was not put in place")
            if made:
                made.compare(verification.checksums, _calibrated(manifest))
            manifest = manifest.with_checksums(verification.checksums)
        output.put(MANIFEST, manifest.sealed(None if options.private_paths else output.out))
        output.finish()
    remember(manifest.sources)
    warnings = (
        *plan.warnings,
        *ready.warnings,
        *unknown_past,
        *output.notes,
        *(made.warnings if made else ()),
        *block_warnings(diagnostics),
    )
    return Outcome(verification, warnings, manifest.calibration, total_seconds(manifest.blocks))


def passed(verification: Verification, out: Path, hint: str) -> Verification:
    """The checks of a folder that is, or will be, ``out``.

    Raises:
        VerifyError: one failed.
    """
    if failed := verification.failed:
        raise VerifyError(f"{failed[0].name}: {failed[0].detail}", where=out, hint=hint)
    return replace(verification, folder=out)


@contextmanager
def _unchanged_sources(plan: Plan) -> Iterator[None]:
    """A source that changes during the run makes its result invalid, whether or not reading it failed."""

    def check() -> None:
        try:
            plan.check_sources()
        except CheckpointError as error:
            raise VerifyError(
                "a source has changed during the run", where=error.where, hint="start over with --overwrite"
            ) from None

    try:
        yield
    except CheckpointError:
        check()
        raise
    check()


def other_files(plan: Plan, out: Path, past: Sequence[Growth], options: RunOptions) -> dict[str, bytes]:
    """All files of an output but the weights and the manifest: name -> content.

    Args:
        plan: The plan.
        out: The output folder, or its address as a path.
        past: Earlier growths of the sources.
        options: Model card, private paths.
    """
    written = shared_recipe(plan)
    files = {name: c if isinstance(c, bytes) else read_small(c) for name, c in plan.files.items()}
    if len(plan.shards) > 1:
        files[INDEX] = index_json(plan.shards)
    files["config.json"] = (json_text(plan.config, indent=2) + "\n").encode()
    if options.private_paths:
        files[RECIPE], files[ORIGINAL] = dump_recipe(plan.recipe).encode(), _readable(as_written(plan.recipe))
    else:
        recipe = dump_recipe(plan.recipe, lambda path: shared_path(path, out))
        files[RECIPE], files[ORIGINAL] = recipe.encode(), _readable(written)
    if options.model_card:
        files["README.md"] = _readable(model_card(plan, written, past))
    return files


def _readable(text: str) -> bytes:
    """Text for people as UTF-8; bytes of names that are not are escaped."""
    return text.encode("utf-8", "backslashreplace")


@contextmanager
def _resume_hints(output: OutputFolder) -> Iterator[None]:
    """Whatever stops the run, say what has been saved and how to go on."""
    try:
        yield
    except BaseException as error:
        # a resumed run would meet these again
        if output.resumable and isinstance(error, CheckpointError | SolverError | TrainingError):
            add_hint(error, "then start over with --overwrite")
        elif hint := output.resume_hint:
            add_hint(error, hint)
        raise


def _calibrated(manifest: Manifest) -> frozenset[str]:
    """The tensors that a calibration has changed."""
    layers = manifest.calibration.layers if manifest.calibration else ()
    return frozenset(name for layer in layers for name in layer.tensors)


def block_warnings(diagnostics: Diagnostics) -> tuple[str, ...]:
    """What the blocks of a run reported: one warning for all plans that missed their tolerance, one for all scales that
    hold zeros."""
    lines = [line for block in diagnostics.values() for line in block]
    texts = list(dict.fromkeys(d["warning"] for d in lines if "warning" in d))
    return (*_convergence(lines), *((some_of(texts, 3),) if texts else ()))


def _convergence(lines: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    missed = [d for d in lines if d.get("converged") is False]
    if not missed:
        return ()
    worst = max(missed, key=lambda d: d["marginal_error"])
    return (
        f"{len(missed)} transport plans did not reach the tolerance; the worst is {worst['tensor']} with an L1 marginal"
        f" error of {worst['marginal_error']:.2g} after {worst['iterations']} iterations: raise reg or max_iterations",
    )
