"""What a worker does that makes pieces of an output, wherever it runs."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from ..checkpoint.piece_store import FORMAT, PieceRecord, PieceStore
from ..checkpoint.shards import ShardWriter
from ..checkpoint.staging import StagingArea
from ..core.errors import DeusMergeError, PlanError
from ..core.tensors import StoredTensor
from ..plan.blocks import BlockPlan
from ..plan.pieces import Piece
from ..plan.types import Plan
from ..verify.weights import TensorCheck, examine
from .block_runner import BlockRecord, is_record
from .engines import Job, OnFraction, engine_of
from .events import OnEvent, unheard
from .preflight import RunOptions, check_apart, check_memory, computing, is_complete, processes_of, run_identity

#: called after each block, with whether it was finished already
OnBlock = Callable[[BlockPlan, bool], None]
#: parts of an identity that round differently at most in the last digits: --mixed-machines allows them to differ
_ROUNDING = {"torch", "instruction_set", "device_model", "threads", "device"}


class PieceJob:
    """A worker's view of an output: checked once, then pieces are made one after another.

    Args:
        plan: The plan.
        out: The output folder: the pieces are put into a folder next to it.
        options: Device, seed, threads, memory; whether an existing output will be replaced.
        mixed_machines: Go on where finished pieces come from machines that round differently.

    Attributes:
        device: The name of the device; None where nothing is computed.
        store: The pieces.
        complete: The output is there already.
        warnings: Messages for the user.

    Raises:
        DeusMergeError: the run is impossible, or there are finished pieces of another run.
    """

    def __init__(self, plan: Plan, out: Path, options: RunOptions, *, mixed_machines: bool = False):
        self.plan, self.options = plan, options
        device, run_record = computing(plan, options)
        self.device, self._run_record = str(device) if device else None, run_record
        self.threads = int(str(run_record["threads"]))
        self.warnings = check_memory(plan, options)
        self.identity = run_identity(run_record, device) | {"sources": source_states(plan)}
        area = StagingArea(out)
        check_apart(area.out, [m.checkpoint for m in plan.models])
        self.store = PieceStore(area, plan.hash)
        self.complete = not options.overwrite and is_complete(plan, area.out, run_record)
        if not self.complete:
            area.check(options.overwrite)
            if record := self.store.any_record():
                checked_identity([record.identity, self.identity], mixed_machines, self.store.folder)

    def make(
        self,
        piece: Piece,
        on_block: OnBlock = lambda block, resumed: None,
        on_fraction: OnFraction | None = None,
        on_event: OnEvent = unheard,
    ) -> bool:
        """Make a piece, unless it is finished.

        Args:
            piece: The piece.
            on_block: Called after each block, with whether it was finished already.
            on_fraction: As for `run_blocks`.
            on_event: Called with what happens.

        Returns:
            Whether it was made.

        Raises:
            DeusMergeError: a tensor cannot be read, merged or written.
        """
        if self.complete or finished_piece(self.store, piece):
            for block in piece.blocks:
                on_block(block, True)
            on_event(about(piece, "piece found"))
            return False
        on_event(about(piece, "piece started"))
        try:
            self._make(piece, on_block, on_fraction, on_event)
        except DeusMergeError:
            # others may have made this piece, too, and finished the output
            overwrite = self.options.overwrite
            self.complete = not overwrite and is_complete(self.plan, self.store.out, self._run_record)
            if not self.complete:
                raise
        on_event(about(piece, "piece done"))
        return True

    def _make(self, piece: Piece, on_block: OnBlock, on_fraction: OnFraction | None, on_event: OnEvent) -> None:
        began, blocks = time.monotonic(), {}

        def finished(block: BlockPlan, told: BlockRecord) -> None:
            blocks[str(block.index)] = told
            on_block(block, False)

        with self.store.attempt(piece.name) as folder:
            writer = ShardWriter(folder, piece.shards)
            try:
                indices = [block.index for block in piece.blocks]
                options = self.options
                limits = self.threads, options.max_memory
                job = Job(self.plan, indices, writer, self.device, options.seed, *limits, on_fraction, on_event)
                engine_of(processes_of(options)).run(job, finished)
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
                received=writer.received,
            )
            self.store.finish(record)


def about(piece: Piece, event: str, **more: object) -> dict[str, object]:
    """An event of a piece."""
    return {"event": event, "piece": piece.name, "blocks": [block.title for block in piece.blocks], **more}


def _written(piece: Piece, folder: Path) -> Iterator[StoredTensor]:
    """The tensors of a piece's files."""
    for shard in piece.shards:
        for name, (begin, end) in shard.tensors.items():
            entry = shard.entries[name]
            yield StoredTensor(name, entry.dtype, entry.shape, folder / shard.filename, begin, end - begin)


def finished_piece(store: PieceStore, piece: Piece) -> PieceRecord | None:
    """The record of a finished piece: one that has all its files, tensors and blocks, and no others."""
    record = store.record(piece.name)
    if record is None:
        return None
    fits = (
        dict(record.files) == {shard.filename: shard.size for shard in piece.shards}
        and record.checksums.keys() == {name for shard in piece.shards for name in shard.tensors}
        and record.blocks.keys() == {str(block.index) for block in piece.blocks}
        and all(map(is_record, record.blocks.values()))
        and {"device", "threads", "seed", "sources"} <= record.identity.keys()
    )
    return record if fits else None


def checked_identity(
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
    if set(names) <= _ROUNDING and mixed_machines:
        return first, ("its pieces come from machines that round differently: a single run may give other last digits",)
    other = next(i for i in identities if i != first)
    raise PlanError(
        f"the pieces are of different runs: they differ in {', '.join(names)}",
        where=folder,
        expected=", ".join(f"{name} {first.get(name)}" for name in names),
        got=", ".join(f"{name} {other.get(name)}" for name in names),
        hint=_how_to_agree(names, first),
    )


def _how_to_agree(names: Sequence[str], first: Mapping[str, object]) -> str:
    """What to do about pieces whose identities differ in these names."""
    if names == ["threads"]:
        return f"run it with --threads {first.get('threads')}; --mixed-machines accepts another number"
    if set(names) <= _ROUNDING:
        return "--mixed-machines accepts other machines, which round differently"
    return "use the same sources, versions and options, or remove this folder to start over"


def source_states(plan: Plan) -> list[list]:
    """The state of the sources, equal on all machines that read the same files: of the hub's cache the names of its
    blobs, which are digests; of files elsewhere their tag; of others name, size and modification time."""
    return [
        [
            [stamp.name, stamp.size, stamp.tag or _blob(file) or stamp.modified]
            for stamp, file in zip(model.stamp, model.checkpoint.files, strict=True)
        ]
        for model in plan.models
    ]


def _blob(file: Path) -> str | None:
    """The digest of a file of the hub's cache; None for any other file."""
    target = Path(os.path.realpath(file))
    digest = re.fullmatch(r"[0-9a-f]{64}", target.name)
    return target.name if digest and target.parent.name == "blobs" else None
