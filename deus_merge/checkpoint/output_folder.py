"""The output folder: built in a staging folder, journalled, and renamed in one step when it is complete."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, nullcontext, suppress
from pathlib import Path
from types import MappingProxyType

from ..core.errors import MachineError, PlanError
from .journal import FinishedBlock, Journal, check_journal
from .layout import ShardLayout
from .shards import ShardWriter
from .staging import StagingArea
from .system import check_lock, disk_errors, link_or_copy, locked, make_folder, sync_path, write_file

# A flush slows the run down to the disk's speed, so it is rare; a kill costs at most this much work.
FLUSH_BYTES = 1 << 30
FLUSH_SECONDS = 10.0


class OutputFolder:
    """A folder that appears under its name when it is complete. A context manager; nothing is final before `finish`.

    Args:
        out: The path of the output folder. Links are followed.
        plan_hash: Hash of everything that the result depends on; a resumed run must have the same.
        identity: More that must be equal on resume, by name, so that a refusal can say what differs: JSON values.
        overwrite: Replace a model folder that has this path.
        resume: Continue an interrupted run; without one this is a fresh run.
        flush_bytes: Finished blocks are brought to the disk after this many bytes of tensors ...
        flush_seconds: ... or this many seconds, whichever comes first.

    Attributes:
        area: The path of the output folder, and the folders next to it that a run works in.
        out: The path, links resolved.
        folder: The output folder under construction.
        finished: Block -> diagnostics, for blocks that are complete on the disk. Filled on resume.
        notes: Messages for the user: one sentence each.

    Raises:
        PlanError: ``out`` is not a local path.

    Entering raises:
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
        flush_bytes: int = FLUSH_BYTES,
        flush_seconds: float = FLUSH_SECONDS,
    ):
        self.area = StagingArea(out)
        self.out, self.folder = self.area.out, self.area.new
        self.notes: list[str] = []
        self._plan_hash = plan_hash
        self._identity = dict(identity or {})
        self._overwrite = overwrite
        self._resume = resume
        self._flush_bytes, self._flush_seconds = flush_bytes, flush_seconds
        self._open_journal: Journal | None = None
        self._writer: ShardWriter | None = None
        self._pending: list[FinishedBlock] = []
        self._flushing: Future[None] | None = None
        self._flushed_bytes = 0
        self._flushed_at = time.monotonic()
        self._opened = False  # whether this run has made the staging folder anew
        self._committed = False
        self._stack = ExitStack()

    @property
    def finished(self) -> Mapping[str, dict]:
        return MappingProxyType(self._open_journal.finished if self._open_journal else {})

    @property
    def resumable(self) -> bool:
        """Whether a run with ``resume`` could use finished blocks of this one."""
        return not self._committed and bool(self.finished)

    @property
    def resume_hint(self) -> str | None:
        """Message for the user after an interrupt or an error; None when there is nothing to say."""
        if self._committed:
            return f"{self.out} is complete"
        if not self.resumable:
            return None
        count = len(self.finished)
        saved = f"{count} finished {'block is' if count == 1 else 'blocks are'} saved in {self.area.staging}"
        return f"{saved}; run the same command with --resume to continue"

    def __enter__(self) -> OutputFolder:
        self.area.check(self._overwrite)
        try:
            with disk_errors(self.out):
                make_folder(self.out.parent)
                if not self._stack.enter_context(locked(self.area.lock, self.out)):
                    self.notes.append(
                        "this file system does not support locks: make sure that no other run writes to this folder"
                    )
                self.area.recover()
                self._pool = self._stack.enter_context(ThreadPoolExecutor(1, "flush"))
                self._open(self._check_resume())  # checked again: a run may have finished before we got the lock
        except BaseException:  # an interrupt can come between any two of these lines
            with self._stack:
                self._discard_unused()
            raise
        return self

    def shards(
        self, layouts: Sequence[ShardLayout], made: Mapping[str, Path] | None = None, *, link: bool = True
    ) -> ShardWriter:
        """Create the shards, or open those of the resumed run. Call it once.

        Args:
            layouts: The shards.
            made: All of them, finished, in other folders of this file system: name -> file.
            link: Whether the shards may be second names of those files, where the file system has such: then writing
                into a shard changes that file, too.

        Raises:
            PlanError, MachineError: as `ShardWriter`.
        """
        for name, file in (made or {}).items():
            with disk_errors(self.folder / name):
                link_or_copy(file, self.folder / name, link=link)
        self._writer = ShardWriter(self.folder, layouts, resume=bool(self.finished or made))
        self._stack.callback(self._writer.close)
        return self._writer

    def record(self, block: str, diagnostics: Mapping[str, object]) -> None:
        """Record that all tensors of a block are written. Its journal line follows its data with the next flush.

        Args:
            block: The block's name.
            diagnostics: What a resumed run needs to know of it: JSON values.

        Raises:
            MachineError: an earlier flush failed: no space left, or the disk fails.
        """
        self._pending.append(FinishedBlock(block, dict(diagnostics)))
        written = self._writer.bytes_written if self._writer else 0
        if self._flushing is not None and self._flushing.done():
            self._await_flush()
        seconds = time.monotonic() - self._flushed_at
        if written - self._flushed_bytes >= self._flush_bytes or seconds >= self._flush_seconds:
            self._start_flush()

    def put(self, name: str, content: bytes) -> None:
        """Write a file next to the weights, or in a folder there.

        Args:
            name: Its name, like ``1_Pooling/config.json``.
            content: Its bytes.

        Raises:
            MachineError: no space left, or the disk fails.
        """
        with disk_errors(self.folder / name):
            make_folder((self.folder / name).parent)
            write_file(self.folder / name, content)

    def flush(self, wait: bool = True) -> None:
        """Bring every recorded block to the disk.

        Args:
            wait: Return when it is done; otherwise as soon as it has begun.

        Raises:
            MachineError: no space left, or the disk fails.
        """
        self._start_flush()
        if wait:
            self._await_flush()

    def finish(self) -> None:
        """Bring everything to the disk and give the folder its final name.

        Raises:
            PlanError: ``out`` has become unusable meanwhile; finished blocks stay resumable.
            MachineError: no space left, or the disk fails; finished blocks stay resumable.
        """
        self.flush()
        self.area.check(self._overwrite)
        if self._writer:
            self._writer.close()
        with disk_errors(self.out):
            for root, _, files in os.walk(self.folder, topdown=False):
                for name in files:
                    sync_path(Path(root, name))
                sync_path(Path(root))
            self._journal.finish(os.stat(self.folder).st_ino)
        try:
            self.area.commit()
        except OSError as error:
            raise MachineError(
                f"the finished folder cannot be renamed: {error.strerror}",
                where=self.out,
                hint=f"move {self.out} away" if self.out.exists() else None,
            ) from error
        self._committed = True
        try:
            self.area.discard()
        except OSError as error:
            self.notes.append(f"the replaced folder could not be removed: {self.area.staging} ({error.strerror})")

    def __exit__(self, kind, error, trace) -> None:
        self._stack.callback(self._leave)  # the first to be called: before the files close and the lock is released
        with self._stack:
            if not self._committed:
                with suppress(Exception) if error is not None else nullcontext():
                    self.flush()  # an interrupt saves finished blocks; a second failure must not hide the first

    def _leave(self) -> None:
        self._pool.shutdown()  # a flush still running uses the files and the journal
        self._journal.close()
        with suppress(OSError):  # what cannot be completed now is completed by the next run
            self._committed = self._committed or self.area.committed
            self.area.recover()
        self._discard_unused()

    def _discard_unused(self) -> None:
        """Remove a staging folder of this run's own in which no block is finished."""
        if self._opened and not self._committed and not self.finished:
            if self._open_journal:
                self._open_journal.close()
            with suppress(OSError):
                self.area.discard()

    def check(self) -> None:
        """Raise everything that entering would refuse; changes nothing on the disk.

        Raises:
            PlanError: ``out`` is in the way, another run writes there, or the interrupted run was another one.
        """
        self.area.check(self._overwrite)
        check_lock(self.area.lock, self.out)
        self._check_resume()

    def tidy(self) -> None:
        """Remove the staging folder of a run that was stopped right after its folder had got its final name.

        Raises:
            PlanError: another run is writing there.
            MachineError: it cannot be removed.
        """
        if self.area.staging.exists() or self.area.lock.exists():
            with disk_errors(self.out), locked(self.area.lock, self.out):
                if not self.area.resumable_blocks:
                    self.area.discard()

    @property
    def _journal(self) -> Journal:
        assert self._open_journal is not None, "the output folder has not been entered"
        return self._open_journal

    def _check_resume(self) -> bool:
        """Whether there is an interrupted run to continue."""
        self.area.check(self._overwrite)
        if not (count := self.area.resumable_blocks):
            return False
        if self._resume:
            check_journal(self.area.staging, self._plan_hash, self._identity)
            if self.folder.is_symlink() or not self.folder.is_dir():
                raise PlanError(
                    "cannot resume", where=self.folder, got="not a folder", hint="start over with --overwrite"
                )
        elif not self._overwrite:
            raise PlanError(
                "an earlier run to this output was interrupted",
                where=self.area.staging,
                got=f"{count} finished {'block' if count == 1 else 'blocks'}",
                hint="continue it with --resume, or start over with --overwrite",
            )
        return self._resume

    def _open(self, resume: bool) -> None:
        if resume:
            self._open_journal = Journal.reopen(self.area.staging)
            return
        self._opened = True
        self.area.discard()
        if self._resume:
            self.notes.append("there was nothing to resume: this is a fresh run")
        self.area.staging.mkdir()
        self.folder.mkdir()
        self._open_journal = Journal.create(self.area.staging, self._plan_hash, self._identity)
        sync_path(self.area.staging)
        sync_path(self.out.parent)

    def _start_flush(self) -> None:
        self._await_flush()
        self._flushed_at = time.monotonic()
        self._flushed_bytes = self._writer.bytes_written if self._writer else 0
        if self._pending:
            batch, self._pending = self._pending, []
            dirty = self._writer.take_dirty() if self._writer else frozenset()
            self._flushing = self._pool.submit(self._flush, batch, dirty)

    def _flush(self, batch: list[FinishedBlock], dirty: frozenset[str]) -> None:
        # In a thread of its own: the next block is merged while the pages of this one go to the disk.
        if self._writer:
            self._writer.sync(dirty)
        with disk_errors(self.out):
            self._journal.append(batch)

    def _await_flush(self) -> None:
        # A failed flush stays failed: the kernel reports lost pages once, so a later success would prove nothing.
        if self._flushing is not None:
            self._flushing.result()
            self._flushing = None
