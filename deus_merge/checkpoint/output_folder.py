"""The output folder: built beside its place, journalled, and put in place in one step when it is whole."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, nullcontext, suppress
from pathlib import Path
from types import MappingProxyType

from ..core.errors import MachineError, PlanError
from .journal import Journal
from .layout import ShardLayout
from .shards import ShardWriter
from .staging import Place
from .system import check_lock, disk_told, locked, make_folder, sync_path, write_file

# A flush makes the disk's speed ours, so it is rare; what a kill costs is at most this much work.
FLUSH_BYTES = 1 << 30
FLUSH_SECONDS = 10.0


class OutputFolder:
    """A folder that appears when it is whole. A context manager; nothing is final before `finish`.

    Args:
        out: Where the folder shall stand. A link is followed.
        plan_hash: What the result depends on; a resume needs the same.
        identity: More that must be equal on resume, by name, so that a refusal can say what differs: JSON values.
        overwrite: Replace a model folder that is there.
        resume: Go on with what an interrupted run left; without such a run this is a fresh one.

    Attributes:
        place: Where it shall stand, and the names beside that.
        out: The place, links followed.
        folder: The folder in the making.
        finished: Block -> diagnostics, for blocks that are whole on the disk. Filled on resume.
        notes: What the user should be told: one sentence each.

    Raises (on entering):
        PlanError: ``out`` is in the way, another run writes there, or the interrupted run was another one.
        MachineError: no space left, or the disk fails.
    """

    def __init__(
        self,
        out: Path | str,
        *,
        plan_hash: str,
        identity: Mapping[str, object] | None = None,
        overwrite: bool = False,
        resume: bool = False,
    ):
        self.place = Place(out)
        self.out, self.folder = self.place.out, self.place.new
        self.notes: list[str] = []
        self._plan_hash = plan_hash
        self._identity = dict(identity or {})
        self._overwrite = overwrite
        self._resume = resume
        self._journal: Journal | None = None
        self._writer: ShardWriter | None = None
        self._pending: list[tuple[str, dict]] = []
        self._flushing: Future | None = None
        self._flushed_bytes = 0
        self._flushed_at = time.monotonic()
        self._placed = False

    @property
    def finished(self) -> Mapping[str, dict]:
        return MappingProxyType(self._journal.finished if self._journal else {})

    @property
    def resumable(self) -> bool:
        """Whether there is something that a run with ``resume`` need not do again."""
        return not self._placed and bool(self.finished)

    @property
    def resume_hint(self) -> str | None:
        """What to tell the user after an interrupt or an error; None when there is nothing."""
        if self._placed:
            return f"{self.out} is whole"
        if not self.resumable:
            return None
        kept = f"{len(self.finished)} blocks are kept in {self.place.workshop}"
        return f"{kept}; run the same command with --resume to go on"

    def __enter__(self) -> OutputFolder:
        self.place.check(self._overwrite)
        with ExitStack() as stack, disk_told(self.out):
            make_folder(self.out.parent)
            if not stack.enter_context(locked(self.place.lock, self.out)):
                self.notes.append("this file system has no locks: make sure that no other run writes to this folder")
            self.place.settle()
            self._open(self._goes_on())  # checked again, since a run may have finished while we had no lock
            self._pool = stack.enter_context(ThreadPoolExecutor(1, "flush"))
            self._stack = stack.pop_all()
        return self

    def shards(self, layouts: Sequence[ShardLayout]) -> ShardWriter:
        """Create the shards, or go on with those of the resumed run. Once a run."""
        self._writer = ShardWriter(self.folder, layouts, resume=bool(self.finished))
        self._stack.callback(self._writer.close)
        return self._writer

    def record(self, block: str, diagnostics: Mapping[str, object]) -> None:
        """A block is written. Its line goes to the journal with the next flush, after its data.

        Raises:
            MachineError: an earlier flush failed: no space left, or the disk fails.
        """
        self._pending.append((block, dict(diagnostics)))
        written = self._writer.bytes_written if self._writer else 0
        if self._flushing is not None and self._flushing.done():
            self._await_flush()
        due = written - self._flushed_bytes >= FLUSH_BYTES or time.monotonic() - self._flushed_at >= FLUSH_SECONDS
        if due:
            self._start_flush()

    def put(self, name: str, content: bytes) -> None:
        """Write a file beside the weights.

        Raises:
            MachineError: no space left, or the disk fails.
        """
        with disk_told(self.folder / name):
            write_file(self.folder / name, content)

    def flush(self, wait: bool = True) -> None:
        """Bring every recorded block to the disk now, or begin to.

        Raises:
            MachineError: no space left, or the disk fails.
        """
        self._start_flush()
        if wait:
            self._await_flush()

    def finish(self) -> None:
        """Bring everything to the disk and put the folder in its place.

        Raises:
            PlanError: something has come into the way meanwhile; what was done stays resumable.
            MachineError: no space left, or the disk fails; what was done stays resumable.
        """
        self.flush()
        self.place.check(self._overwrite)
        if self._writer:
            self._writer.close()
        with disk_told(self.out):
            for root, _, files in os.walk(self.folder, topdown=False):
                for name in files:
                    sync_path(Path(root, name))
                sync_path(Path(root))
            self._journal.seal(os.stat(self.folder).st_ino)
        try:
            self.place.take()
        except OSError as error:
            raise MachineError(
                f"the finished folder cannot be put in place: {error.strerror}",
                where=self.out,
                hint=f"move {self.out} away" if self.out.exists() else None,
            ) from error
        self._placed = True
        try:
            self.place.clear()
        except OSError as error:
            self.notes.append(f"what was replaced could not be removed: {self.place.workshop} ({error.strerror})")

    def __exit__(self, kind, error, trace) -> None:
        self._stack.callback(self._leave)  # first in the unwinding: before the files close and the lock goes
        with self._stack:
            if not self._placed:
                with suppress(Exception) if error is not None else nullcontext():
                    self.flush()  # an interrupt keeps what is done; a second failure must not hide the first

    def _leave(self) -> None:
        self._pool.shutdown()  # a flush still running uses the files and the journal
        self._journal.close()
        with suppress(OSError):  # what cannot be ended now is ended by the next run
            self._placed = self._placed or self.place.taken
            self.place.settle()
            if not self._placed and not self.finished:
                self.place.clear()

    def check(self) -> None:
        """Everything that entering would refuse, with nothing touched.

        Raises:
            PlanError: ``out`` is in the way, another run writes there, or the interrupted run was another one.
        """
        self.place.check(self._overwrite)
        check_lock(self.place.lock, self.out)
        self._goes_on()

    def tidy(self) -> None:
        """Remove what a run that was stopped after putting its folder in place has left.

        Raises:
            PlanError: another run is at work.
            MachineError: it cannot be removed.
        """
        if self.place.workshop.exists() or self.place.lock.exists():
            with disk_told(self.out), locked(self.place.lock, self.out):
                if not self.place.unfinished:
                    self.place.clear()

    def _goes_on(self) -> bool:
        """Whether there is an interrupted run to go on with."""
        self.place.check(self._overwrite)
        if not (kept := self.place.unfinished):
            return False
        if self._resume:
            Journal.check(self.place.workshop, self._plan_hash, self._identity)
            if self.folder.is_symlink() or not self.folder.is_dir():
                raise PlanError("cannot resume", where=self.folder, got="no folder", hint="start over with --overwrite")
        elif not self._overwrite:
            raise PlanError(
                "an unfinished run has left its work",
                where=self.place.workshop,
                got=f"{kept} finished blocks",
                hint="go on with --resume, or start over with --overwrite",
            )
        return self._resume

    def _open(self, go_on: bool) -> None:
        if go_on:
            self._journal = Journal.reopen(self.place.workshop)
            return
        self.place.clear()
        if self._resume:
            self.notes.append("there was nothing to resume: this is a fresh run")
        try:
            self.place.workshop.mkdir()
            self.folder.mkdir()
            self._journal = Journal.create(self.place.workshop, self._plan_hash, self._identity)
            sync_path(self.place.workshop)
            sync_path(self.out.parent)
        except BaseException:
            if self._journal:
                self._journal.close()
            with suppress(OSError):
                self.place.clear()
            raise

    def _start_flush(self) -> None:
        self._await_flush()
        self._flushed_at = time.monotonic()
        self._flushed_bytes = self._writer.bytes_written if self._writer else 0
        if self._pending:
            batch, self._pending = self._pending, []
            dirty = self._writer.take_dirty() if self._writer else frozenset()
            self._flushing = self._pool.submit(self._flush, batch, dirty)

    def _flush(self, batch: list[tuple[str, dict]], dirty: frozenset[str]) -> None:
        # In its own thread: the next block is merged while this one's pages go to the disk.
        if self._writer:
            self._writer.sync(dirty)
        with disk_told(self.out):
            self._journal.append(batch)

    def _await_flush(self) -> None:
        # A failed flush stays, and fails again: the kernel tells of lost pages once, so a later success proves nothing.
        if self._flushing is not None:
            self._flushing.result()
            self._flushing = None
