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
from ..core.errors import PlanError
from ..core.tensors import StoredTensor
from ..core.text import plural, some_of
from ..plan.blocks import BlockPlan
from ..plan.pieces import Piece, pieces, share
from ..plan.types import Plan
from ..verify.weights import TensorCheck, examine
from .block_runner import run_blocks
from .engines.finished_pieces import FinishedPieces
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
        warnings: Messages for the user.
    """

    made: tuple[Piece, ...]
    found: tuple[Piece, ...]
    left: int
    warnings: tuple[str, ...]


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
        return Share((), mine, 0, (*plan.warnings, "the output is already complete: nothing was left to do"))
    done = {piece.name: record for piece in found if (record := job.store.record(piece.name))}
    _checked_identity([job.identity, *(record.identity for record in done.values())], mixed_machines, job.store.folder)
    made = []
    for piece in mine:
        if piece.name not in done:
            job.make(piece, on_block)
            made.append(piece)
            continue
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
    store = PieceStore(StagingArea(out), plan.hash)
    resumed = replace(options, resume=True)
    if is_complete(plan, store.out, None) and not store.folder.exists():
        return execute(plan, out, resumed, on_block, calibrator)
    outcome = execute(plan, out, resumed, on_block, calibrator, _finished(plan, store, mixed_machines))
    store.discard()
    return outcome


class _PieceJob:
    """A worker's view of an output: checked once, then pieces are made one after another."""

    def __init__(self, plan: Plan, out: Path, options: RunOptions):
        self.plan, self.options = plan, options
        self.device, run_record = computing(plan, options)
        self.warnings = check_memory(plan, options)
        self.identity = run_identity(run_record, self.device) | {"sources": _sources(plan)}
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
                run_blocks(
                    self.plan,
                    [block.index for block in piece.blocks],
                    writer,
                    device=self.device,
                    seed=self.options.seed,
                    max_memory=self.options.max_memory,
                    on_block=finished,
                )
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


def _finished(plan: Plan, store: PieceStore, mixed_machines: bool) -> FinishedPieces:
    """The finished pieces of a plan.

    Raises:
        PlanError: one is missing, or they do not belong together.
    """
    found = pieces(plan)
    records = {piece: store.record(piece.name) for piece in found}
    if missing := [piece for piece, record in records.items() if record is None]:
        raise PlanError(
            f"{len(missing)} of {plural(len(found), 'piece')} {'is' if len(missing) == 1 else 'are'} missing",
            where=store.folder,
            got=f"not finished: {some_of((piece.title for piece in missing), 5)}",
            hint="merge RECIPE OUT --shard-of 1/1 makes what is missing; so does every worker's command, run again",
        )
    done = [record for record in records.values() if record is not None]
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
