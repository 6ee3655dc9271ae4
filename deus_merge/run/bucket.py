"""Outputs in buckets: pieces are made in scratch folders and uploaded, and the manifest comes last."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from ..checkpoint.bucket_pieces import BucketPieces
from ..checkpoint.index import INDEX
from ..checkpoint.piece_store import PieceStore
from ..checkpoint.scratch import check_scratch
from ..checkpoint.staging import StagingArea
from ..core.errors import PlanError, add_hint
from ..core.urls import address_of
from ..plan.blocks import BlockPlan
from ..plan.pieces import pieces
from ..plan.types import Plan
from ..report.block_times import total_seconds
from ..report.known_sources import remember
from ..report.lineage import ancestors
from ..report.manifest import MANIFEST, RECIPES
from ..report.plan_manifest import manifest_of, plan_sources
from ..verify import verify
from .complete import is_complete
from .engines import FinishedPieces
from .events import OnEvent
from .executor import Outcome, block_warnings, other_files, passed
from .preflight import RunOptions, check_memory, computing, processes_of

#: called after each block, with whether it was finished already
OnBlock = Callable[[BlockPlan, bool], None]


def piece_store(plan: Plan, out: Path) -> PieceStore | BucketPieces:
    """Where workers put the pieces of an output.

    Args:
        plan: The plan.
        out: The output folder, or its address as a path.

    Raises:
        PlanError: outputs cannot be written there.
        CheckpointError: not a valid address, or obstore is not installed.
    """
    address = address_of(out)
    if address is None:
        return PieceStore(StagingArea(out), plan.hash)
    names = (*plan.files, *(shard.filename for shard in plan.shards), *RECIPES)
    names = (*names, INDEX, "config.json", "README.md", MANIFEST)
    return BucketPieces(address, plan.hash, names, _tagged_weights(plan))


def _tagged_weights(plan: Plan) -> set[tuple[str, str]]:
    """The names and ETags of the files of weights that a plan reads from other machines."""
    found = set()
    for source in plan_sources(plan):
        etags = source.provenance.get("etags")
        if isinstance(etags, Mapping):
            found |= {(path.name, etags[path.name]) for path in source.files if path.name in etags}
    return found


def check_in_bucket(plan: Plan, store: BucketPieces, options: RunOptions) -> None:
    """Check what can be known to go wrong with an output in a bucket; changes nothing, and asks nothing of the bucket.

    Raises:
        PlanError: the recipe has a calibration, a source is in the way, or there is no room for a piece.
    """
    if plan.calibration is not None:
        raise PlanError(
            "an output in a bucket cannot be calibrated: its weights would be changed where they are",
            where=store.out,
            hint="write to a local folder, and upload that; or leave out calibrate",
        )
    ours = f"{address_of(store.out)}/"
    for source in plan_sources(plan):
        theirs = f"{source.where}/"
        if ours.startswith(theirs) or theirs.startswith(ours):
            raise PlanError(
                "the output and a source must not contain each other",
                where=store.out,
                expected="an address outside the models",
                got=f"source {source.where}",
            )
    check_scratch(max((piece.nbytes for piece in pieces(plan)), default=0) * processes_of(options))


def check_bucket_run(plan: Plan, out: Path, options: RunOptions) -> tuple[str, ...]:
    """Check everything that can be known to go wrong with a run to a bucket; changes nothing.

    Args:
        plan: The plan.
        out: The address as a path.
        options: As for `executor.execute`.

    Returns:
        Warnings about this machine.

    Raises:
        PlanError: as `check_in_bucket`; too little memory, no such device, or something is at this address.
        CheckpointError: a source has changed since it was planned with; no such bucket, or no right to list it.
    """
    store = piece_store(plan, out)
    assert isinstance(store, BucketPieces)
    _, run_record = computing(plan, options)
    warnings = check_memory(plan, options)
    check_in_bucket(plan, store, options)
    # a run that was stopped when the manifest was there goes on, too
    goes_on = options.resume or (store.begun and not options.overwrite)
    if goes_on and is_complete(plan, store.out, run_record):
        return warnings
    store.check(options.overwrite)
    return warnings


@contextmanager
def kept_pieces(store: BucketPieces, on_event: OnEvent) -> Iterator[OnEvent]:
    """Whatever stops a run to a bucket once a piece is finished, say how to go on.

    Yields:
        ``on_event``, to be called in its place.
    """
    finished = False

    def heard(event: Mapping[str, object]) -> None:
        nonlocal finished
        finished = finished or event["event"] in ("piece done", "piece found")
        on_event(event)

    try:
        yield heard
    except BaseException as error:
        if not finished:
            raise
        add_hint(
            error, f"finished pieces are kept in {address_of(store.folder)}; run the same command again to continue"
        )
        raise


def finish_in_bucket(plan: Plan, store: BucketPieces, options: RunOptions, made: FinishedPieces) -> Outcome | None:
    """Put an output in a bucket together: all other files, the verification, and the manifest at the end.

    Args:
        plan: The plan that the workers had.
        store: The output.
        options: Verification, model card.
        made: The pieces.

    Returns:
        As `executor.execute`; None where another process has finished this output meanwhile.

    Raises:
        DeusMergeError: as `executor.execute`; the manifest is not there.
    """
    began = time.monotonic()
    store.check(overwrite=False)
    plan.check_sources()
    past, unknown_past = ancestors(plan)
    diagnostics = {index: record["tensors"] for index, record in sorted(made.blocks.items())}
    times = {index: record["seconds"] for index, record in made.blocks.items()}
    files = other_files(plan, store.out, past, options)
    run_record = made.run_record | {"seconds": round(time.monotonic() - began + made.seconds, 3)}
    manifest = manifest_of(plan, files, diagnostics, times, run_record, past)
    manifest = replace(manifest, warnings=(*manifest.warnings, *made.warnings))
    store.put_files(files)
    verification = None
    if options.verify:
        sources = list(plan_sources(plan))
        found = verify(store.out, quick=True, manifest=manifest, sources=sources, received=made.received)
        hint = f"the manifest was not written; remove {address_of(store.folder)} to make the pieces again"
        verification = passed(found, store.out, hint)
        made.compare(verification.checksums, ())
        manifest = manifest.with_checksums(verification.checksums)
    plan.check_sources()
    content = manifest.sealed(None if options.private_paths else store.out)
    if not store.put_manifest(content, made.uploaded, files):
        if not is_complete(plan, store.out, made.run_record):
            raise PlanError(
                "another output has been written to this address meanwhile",
                where=store.out,
                hint="replace it with --overwrite, or choose another address",
            )
        return None
    remember(manifest.sources)
    warnings = (*plan.warnings, *unknown_past, *made.warnings, *block_warnings(diagnostics))
    return Outcome(verification, warnings, times=total_seconds(manifest.blocks))
