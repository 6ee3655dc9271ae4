"""An output made piece by piece, by workers on any number of machines that share a file system.

A worker makes its share of the pieces (`make_share`), in any order and as often as it likes; whoever comes last puts
the output together (`finish`). Workers know nothing of each other, so job arrays and clusters of any kind can run them.
The bytes are those of a single run.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

from ..checkpoint.piece_store import FORMAT, PieceRecord, PieceStore
from ..checkpoint.shards import ShardWriter
from ..checkpoint.staging import StagingArea
from ..core.errors import DeusMergeError, PlanError
from ..core.tensors import StoredTensor
from ..core.text import plural, some_of
from ..plan.blocks import BlockPlan
from ..plan.pieces import Piece, pieces, share
from ..plan.types import Plan
from ..verify.weights import TensorCheck, examine
from .engines import FinishedPieces, Job, engine_of
from .engines.finished_pieces import run_record_of
from .executor import Outcome, execute
from .preflight import Calibrator, RunOptions, check_apart, check_memory, computing, is_complete, run_identity

#: parts of an identity that round differently at most in the last digits: --mixed-machines allows them to differ
_ROUNDING = {"torch", "instruction_set", "device_model", "threads", "device"}


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
    on_block: Callable[[BlockPlan, bool], None] = lambda block, resumed: None,
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

    Raises:
        DeusMergeError: the run is impossible; a tensor cannot be read, merged or written; there are finished pieces of
            another machine, or the sources have changed since. Finished pieces are kept.
    """
    found = pieces(plan)
    mine = share(found, number, total)
    job = _PieceJob(plan, out, options)
    if job.complete:
        for block in chain.from_iterable(piece.blocks for piece in mine):
            on_block(block, True)
        return Share((), mine, 0, plan.warnings, complete=True)
    done = {piece.name: record for piece in found if (record := job.store.record(piece.name))}
    _checked_identity([*(record.identity for record in done.values()), job.identity], mixed_machines, job.store.folder)
    made = []
    for piece in mine:
        if piece.name not in done:
            try:
                job.make(piece, on_block)
            except DeusMergeError:
                if is_complete(plan, job.store.out, None):  # others have made this piece, and finished the output
                    return Share(tuple(made), mine, 0, plan.warnings, complete=True)
                raise
            made.append(piece)
        else:
            for block in piece.blocks:
                on_block(block, True)
    left = sum(job.store.record(piece.name) is None for piece in found)
    earlier = tuple(piece for piece in mine if piece.name in done)
    return Share(tuple(made), earlier, left, plan.warnings + job.warnings)


def finish(
    plan: Plan,
    out: Path,
    options: RunOptions,
    on_block: Callable[[BlockPlan, bool], None],
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
    area = StagingArea(out)
    store = PieceStore(area, plan.hash)
    records = {piece.name: record for piece in pieces(plan) if (record := store.record(piece.name))}
    run_record = next((run_record_of(record.identity) for record in records.values()), {})
    complete = is_complete(plan, area.out, run_record)  # a finisher that was stopped may have left some pieces
    made = None if complete else _finished(plan, records, store, mixed_machines)
    options = replace(options, resume=complete or area.resumable_blocks > 0, workers=1)
    outcome = execute(plan, out, options, on_block, calibrator, made)
    store.discard()
    return outcome


class _PieceJob:
    """A worker's view of an output: checked once, then pieces are made one after another."""

    def __init__(self, plan: Plan, out: Path, options: RunOptions):
        self.plan, self.options = plan, options
        device, run_record = computing(plan, options)
        self.device = str(device) if device else None
        self.threads = int(str(run_record["threads"]))
        self.warnings = check_memory(plan, options)
        self.identity = run_identity(run_record, device) | {"sources": _sources(plan)}
        area = StagingArea(out)
        check_apart(area.out, [m.checkpoint for m in plan.models])
        self.store = PieceStore(area, plan.hash)
        self.complete = is_complete(plan, area.out, run_record)
        if not self.complete:
            area.check(options.overwrite)

    def make(self, piece: Piece, on_block: Callable[[BlockPlan, bool], None]) -> None:
        began, blocks = time.monotonic(), {}

        def finished(block: BlockPlan, diagnostics: list[dict]) -> None:
            blocks[str(block.index)] = diagnostics
            on_block(block, False)

        with self.store.attempt(piece.name) as folder:
            writer = ShardWriter(folder, piece.shards)
            try:
                indices = [block.index for block in piece.blocks]
                options = self.options
                job = Job(self.plan, indices, writer, self.device, options.seed, self.threads, options.max_memory)
                engine_of(options.workers).run(job, finished)
            finally:
                writer.close()
            self.plan.check_sources()
            results = examine((TensorCheck(tensor, None) for tensor in _written(piece, folder)), finite=False)
            record = PieceRecord(
                format=FORMAT,
                piece=piece.name,
                plan_hash=self.plan.hash,
                identity=self.identity,
                folder=folder.name,
                files={shard.filename: shard.size for shard in piece.shards},
                checksums={name: result.checksum for name, result in results.items()},
                blocks=blocks,
                seconds=round(time.monotonic() - began, 3),
            )
            self.store.finish(record)


def _written(piece: Piece, folder: Path) -> Iterator[StoredTensor]:
    """The tensors of a piece's files."""
    for shard in piece.shards:
        for name, (begin, end) in shard.tensors.items():
            entry = shard.entries[name]
            yield StoredTensor(name, entry.dtype, entry.shape, folder / shard.filename, begin, end - begin)


def _finished(
    plan: Plan, records: Mapping[str, PieceRecord], store: PieceStore, mixed_machines: bool
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
            hint="merge RECIPE OUT --shard-of 1/1 makes what is missing; so does every worker's command, run again",
        )
    done = list(records.values())
    identity, warnings = _checked_identity([record.identity for record in done], mixed_machines, store.folder)
    return FinishedPieces(
        files={name: path for record in done for name, path in store.files(record).items()},
        blocks={int(index): list(lines) for record in done for index, lines in record.blocks.items()},
        checksums={name: checksum for record in done for name, checksum in record.checksums.items()},
        identity=identity,
        seconds=sum(record.seconds for record in done),
        warnings=warnings,
    )


def _checked_identity(
    identities: Sequence[Mapping[str, object]], mixed_machines: bool, folder: Path
) -> tuple[Mapping[str, object], tuple[str, ...]]:
    """The identity of pieces that may be put together, and warnings.

    Raises:
        PlanError: they may not.
    """
    first = identities[0]
    names = sorted({n for i in identities for n in first.keys() | i.keys() if first.get(n) != i.get(n)})
    if not names:
        return first, ()
    rounding = set(names) <= _ROUNDING
    if rounding and mixed_machines:
        return first, ("its pieces come from machines that round differently: a single run may give other last digits",)
    other = next(i for i in identities if i != first)
    raise PlanError(
        f"the pieces are of different runs: they differ in {', '.join(names)}",
        where=folder,
        expected={name: first.get(name) for name in names},
        got={name: other.get(name) for name in names},
        hint="--mixed-machines accepts other machines, which round differently"
        if rounding
        else "use the same sources, versions and options, or remove this folder to start over",
    )


def _sources(plan: Plan) -> list[list]:
    """The state of the sources, equal on all machines that read the same files: of the hub's cache the names of its
    blobs, which are digests; of other files name, size and modification time."""
    return [
        [
            [stamp.name, stamp.size, blob if (blob := _blob(file)) else stamp.modified]
            for stamp, file in zip(model.stamp, model.checkpoint.files, strict=True)
        ]
        for model in plan.models
    ]


def _blob(file: Path) -> str | None:
    """The digest of a file of the hub's cache; None for any other file."""
    target = Path(os.path.realpath(file))
    digest = re.fullmatch(r"[0-9a-f]{64}", target.name)
    return target.name if digest and target.parent.name == "blobs" else None
