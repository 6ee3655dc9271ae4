"""An output made piece by piece, by workers on any number of machines that share a file system or a bucket.

A worker makes its share of the pieces (`make_share`), in any order and as often as it likes; whoever comes last puts
the output together (`finish`). Workers know nothing of each other, so job arrays and clusters of any kind can run them.
The bytes are those of a single run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from .. import __version__
from ..checkpoint.bucket_pieces import BucketPieces, uploaded_files
from ..checkpoint.piece_store import PieceRecord, PieceStore
from ..checkpoint.staging import StagingArea
from ..core.errors import PlanError
from ..core.text import plural, some_of
from ..plan.pieces import Piece, pieces, share
from ..plan.types import Plan
from ..report.manifest import read_manifest
from ..verify import verify
from .bucket import check_bucket_run, check_in_bucket, finish_in_bucket, kept_pieces, piece_store
from .complete import is_complete
from .engines import FinishedPieces, OnFraction
from .engines.finished_pieces import run_record_of
from .engines.piece_processes import PieceProcesses
from .engines.ray_tasks import make_pieces
from .events import OnEvent, unheard
from .executor import Outcome, execute, passed
from .piece_job import OnBlock, PieceJob, checked_identity, finished_records, source_states
from .preflight import Calibrator, RunOptions, processes_of


@dataclass(frozen=True)
class Share:
    """A share of the pieces of an output, after a worker has made it.

    Attributes:
        made: The pieces that this worker made.
        found: Pieces that were finished already.
        left: How many pieces of the whole output are not finished.
        complete: The output was there already.
        warnings: Messages for the user.
    """

    made: tuple[Piece, ...]
    found: tuple[Piece, ...]
    left: int
    warnings: tuple[str, ...]
    complete: bool = False


def make_share(
    plan: Plan,
    out: Path,
    options: RunOptions,
    number: int,
    total: int,
    *,
    mixed_machines: bool = False,
    on_block: OnBlock = lambda block, resumed: None,
    on_fraction: OnFraction | None = None,
    on_event: OnEvent = unheard,
) -> Share:
    """Make one share of the pieces of an output, those that are not finished.

    Args:
        plan: The plan.
        out: The output folder: the pieces are put into a folder next to it.
        options: Device, seed, threads, memory; whether an existing output will be replaced.
        number: Which share, from 1.
        total: How many shares there are.
        mixed_machines: Go on where finished pieces come from machines that round differently.
        on_block: Called after each block, with whether it was finished already.
        on_fraction: As for `run_blocks`.
        on_event: Called with what happens.

    Raises:
        DeusMergeError: the run is impossible; a tensor cannot be read, merged or written; there are finished pieces of
            another machine, or the sources have changed since. Finished pieces are kept.
    """
    found = pieces(plan)
    mine = share(found, number, total)
    job = PieceJob(plan, out, options, mixed_machines=mixed_machines)
    if isinstance(job.store, BucketPieces) and processes_of(options) > 1 and not job.complete:
        with PieceProcesses(plan, out, options, job.device, mixed_machines=mixed_machines) as processes:
            fresh = processes.make(mine, on_block, on_fraction, on_event)
    else:
        fresh = {piece.name: job.make(piece, on_block, on_fraction, on_event) for piece in mine}
    left = 0 if job.complete else len(found) - len(finished_records(job.store, found))
    made, earlier = (tuple(piece for piece in mine if fresh[piece.name] is new) for new in (True, False))
    return Share(made, earlier, left, plan.warnings + job.warnings, job.complete)


def finish(
    plan: Plan,
    out: Path,
    options: RunOptions,
    on_block: OnBlock,
    calibrator: Calibrator | None = None,
    *,
    mixed_machines: bool = False,
) -> Outcome:
    """Put an output together whose pieces are finished: check them, add all other files, verify, give it its name.

    Args:
        plan: The plan that the workers had.
        out: The output folder.
        options: Overwrite, verification, model card; the rest was the workers' business.
        on_block: As for `execute`.
        calibrator: What calibrates the output, where the plan has a calibration.
        mixed_machines: Accept pieces from machines that round differently.

    Returns:
        As `execute`.

    Raises:
        PlanError: pieces are missing, or do not belong together.
        DeusMergeError: as `execute`.
    """
    store = piece_store(plan, out)
    made, run_record = finished_pieces(plan, out, options, mixed_machines=mixed_machines)
    if isinstance(store, BucketPieces):
        check_in_bucket(plan, store, options)
        outcome = finish_in_bucket(plan, store, options, made) if made else None
    else:
        try:
            resume = StagingArea(out).resumable_blocks > 0
            again = replace(options, resume=resume, workers=1)
            outcome = execute(plan, out, again, on_block, calibrator, made) if made else None
        except PlanError:
            if options.overwrite or not is_complete(plan, store.out, run_record):
                raise
            outcome = None  # another finisher was faster
    outcome = outcome or _complete(plan, store.out, options, on_block)
    store.discard()
    return outcome


def make_in_bucket(
    plan: Plan,
    out: Path,
    options: RunOptions,
    on_block: OnBlock,
    on_fraction: OnFraction | None = None,
    on_event: OnEvent = unheard,
) -> Outcome:
    """Make an output in a bucket, whole: its pieces, one after another, then what `finish` does.

    Args:
        plan: The plan.
        out: The address as a path.
        options: As for `execute`. Finished pieces of an interrupted run are used, with ``resume`` or without.
        on_block: As for `execute`.
        on_fraction: As for `run_blocks`.
        on_event: Called with what happens.

    Returns:
        As `execute`.

    Raises:
        DeusMergeError: as `make_share` and `finish`; or there is something at this address.
    """
    store = piece_store(plan, out)
    assert isinstance(store, BucketPieces)
    warnings = check_bucket_run(plan, out, options)
    if options.overwrite:
        store.claim(overwrite=True)
    with kept_pieces(store, on_event) as heard:
        if isinstance(options.workers, str):
            make_pieces(plan, out, options, options.workers, on_block=on_block, on_event=heard)
        else:
            make_share(plan, out, options, 1, 1, on_block=on_block, on_fraction=on_fraction, on_event=heard)
        outcome = finish(plan, out, options, lambda block, resumed: None)
    return replace(outcome, warnings=tuple(dict.fromkeys((*warnings, *outcome.warnings))))


def finished_pieces(
    plan: Plan, out: Path, options: RunOptions, *, mixed_machines: bool = False
) -> tuple[FinishedPieces | None, Mapping[str, object]]:
    """What `finish` puts together.

    Args:
        plan, out, options, mixed_machines: As for `finish`.

    Returns:
        The pieces, or None where the output is there already; and the options of the workers.

    Raises:
        PlanError: pieces are missing, or do not belong together.
    """
    store = piece_store(plan, out)
    records = finished_records(store, pieces(plan))
    run_record = next((run_record_of(record.identity) for record in records.values()), {"seed": options.seed})
    # a finisher that was stopped may have left some pieces
    replaced = options.overwrite and isinstance(store, PieceStore)
    if not replaced and is_complete(plan, store.out, run_record):
        return None, run_record
    return _finished(plan, records, store, mixed_machines), run_record


def _complete(plan: Plan, out: Path, options: RunOptions, on_block: OnBlock) -> Outcome:
    """The outcome of an output that is there already."""
    for block in plan.blocks:
        on_block(block, True)
    hint = "make its pieces again, and finish them, with --overwrite"
    verification = passed(verify(out, quick=True), out, hint) if options.verify else None
    warnings = (*plan.warnings, "the output is already complete: nothing was left to do")
    return Outcome(verification, warnings, read_manifest(out).calibration)


def _finished(
    plan: Plan, records: Mapping[str, PieceRecord], store: PieceStore | BucketPieces, mixed_machines: bool
) -> FinishedPieces:
    """The finished pieces of a plan.

    Raises:
        PlanError: one is missing, or they do not belong together.
    """
    found = pieces(plan)
    if missing := [piece for piece in found if piece.name not in records]:
        raise PlanError(
            f"{len(missing)} of {plural(len(found), 'piece')} {'is' if len(missing) == 1 else 'are'} missing",
            where=store.folder,
            got=f"not finished: {some_of((piece.title for piece in missing), 5)}",
            hint=f"pieces of another plan are here, too ({', '.join(others)}): give finish the options of the workers"
            if (others := store.other_plans)
            else "merge RECIPE OUT --shard-of 1/1 makes what is missing; so does every worker's command, run again",
        )
    done = list(records.values())
    now = {"deus_merge": __version__, "sources": source_states(plan)}
    wrong = sorted({name for record in done for name in now if record.identity.get(name) != now[name]})
    if wrong:
        raise PlanError(
            f"the pieces were made with other {' and '.join(wrong)}",
            where=store.folder,
            hint="make them again with what there is now: remove this folder, or bring the sources back",
        )
    identity, warnings = checked_identity([record.identity for record in done], mixed_machines, store.folder)
    return FinishedPieces(
        files={name: path for record in done for name, path in store.files(record).items()},
        blocks={int(index): told for record in done for index, told in record.blocks.items()},
        checksums={name: checksum for record in done for name, checksum in record.checksums.items()},
        identity=identity,
        seconds=sum(record.seconds for record in done),
        warnings=warnings,
        received={name: digest for record in done for name, digest in record.received.items()},
        uploaded={name: found for record in done for name, found in uploaded_files(record).items()},
    )
