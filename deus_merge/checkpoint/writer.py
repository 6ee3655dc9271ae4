"""The output folder: built beside its place, journalled, and put in place in one step when it is whole."""

from __future__ import annotations

import os
import shutil
import stat
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, nullcontext, suppress
from fnmatch import fnmatch
from pathlib import Path
from types import MappingProxyType

from ..errors import PlanError
from .journal import FILENAME as JOURNAL
from .journal import Journal
from .layout import ShardLayout
from .shards import ShardWriter
from .system import exchange, locked, space_told, sync_path

# A flush makes the disk's speed ours, so it is rare; what a kill costs is at most this much work.
FLUSH_BYTES = 1 << 30
FLUSH_SECONDS = 10.0

# What --overwrite may take away: anything else in the folder is somebody's own.
_MODEL_FILES = (
    "*.safetensors", "*.json", "*.jinja", "*.model", "*.py", "vocab.txt", "merges.txt", "README.md", "deus_merge.yml",
    "report.html", "LICENSE*", "NOTICE*", "USE_POLICY*", ".gitattributes",
)  # fmt: skip


class OutputFolder:
    """A folder that appears when it is whole. A context manager; nothing is final before `finish`.

    Args:
        out: Where the folder shall stand. A link is followed.
        plan_hash: What the result depends on; a resume needs the same.
        identity: More that must be equal on resume, by name, so that a refusal can say what differs: JSON values.
        overwrite: Replace a model folder that is there.
        resume: Go on with what an interrupted run left; without such a run this is a fresh one.

    Attributes:
        out: The place, links followed.
        folder: The temporary folder beside it; files put there become part of the result.
        finished: Block -> diagnostics, for blocks that are whole on the disk. Filled on resume.
        notes: What the user should be told: one sentence each.

    Raises (on entering):
        PlanError: ``out`` is in the way, another run writes there, or the interrupted run was another one.
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
        self.out = Path(out).resolve()
        self.folder = self.out.parent / f".{self.out.name}.deus-tmp"
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
        self._stack = ExitStack()
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
        """What to tell the user after an interrupt or an error; None when nothing is left to resume."""
        if not self.resumable:
            return None
        return f"{len(self.finished)} blocks are kept in {self.folder}; run the same command with --resume to go on"

    def __enter__(self) -> OutputFolder:
        try:
            self.check_place()
            self.out.parent.mkdir(parents=True, exist_ok=True)
            lock = locked(self.out.parent / f".{self.out.name}.deus-lock", self.out)
            if not self._stack.enter_context(lock):
                self.notes.append("this file system has no locks: make sure that no other run writes to this folder")
            self.check_place()  # again, since a run may have finished while we had no lock
            self._open_folder()
            self._pool = self._stack.enter_context(ThreadPoolExecutor(1, "flush"))
        except OSError as error:
            self._stack.close()
            raise PlanError("the folder cannot be made", where=self.out, got=error.strerror) from error
        except BaseException:
            self._stack.close()
            raise
        return self

    def shards(self, layouts: Sequence[ShardLayout]) -> ShardWriter:
        """Create the shards, or go on with those of the resumed run. Once a run."""
        self._writer = ShardWriter(self.folder, layouts, resume=bool(self.finished))
        self._stack.callback(self._writer.close)
        return self._writer

    def record(self, block: str, diagnostics: Mapping[str, object]) -> None:
        """A block is written. Its line goes to the journal with the next flush, after its data.

        Raises:
            PlanError, OSError: an earlier flush failed.
        """
        self._pending.append((block, dict(diagnostics)))
        written = self._writer.bytes_written if self._writer else 0
        if self._flushing is not None and self._flushing.done():
            self._await_flush()
        due = written - self._flushed_bytes >= FLUSH_BYTES or time.monotonic() - self._flushed_at >= FLUSH_SECONDS
        if due:
            self._start_flush()

    def flush(self) -> None:
        """Bring every recorded block to the disk now."""
        self._start_flush()
        self._await_flush()

    def finish(self) -> None:
        """Bring everything to the disk and put the folder in its place.

        Raises:
            PlanError: something has come into the way meanwhile; what was done stays resumable.
        """
        self.flush()
        self.check_place()
        if self._writer:
            self._writer.close()
        with space_told(self.out):
            for root, _, files in os.walk(self.folder, topdown=False):
                for name in files:
                    sync_path(Path(root, name))
                sync_path(Path(root))
        kept = (self.folder / JOURNAL).read_bytes()
        (self.folder / JOURNAL).unlink()
        try:
            sync_path(self.folder)
            old = self._put_in_place()
        except BaseException:
            if self.folder.is_dir():
                (self.folder / JOURNAL).write_bytes(kept)
            raise
        self._placed = True
        sync_path(self.out.parent)
        if old is not None:
            try:
                shutil.rmtree(old)
            except OSError as error:
                self.notes.append(f"the replaced folder could not be removed: {old} ({error.strerror})")

    def __exit__(self, kind, error, trace) -> None:
        self._stack.callback(self._leave)  # first in the unwinding: before the files close and the lock goes
        with self._stack:
            if not self._placed:
                with suppress(Exception) if error is not None else nullcontext():
                    self.flush()  # an interrupt keeps what is done; a second failure must not hide the first

    def _leave(self) -> None:
        self._pool.shutdown()  # a flush still running uses the files and the journal
        if self._journal:
            self._journal.close()
        if not self._placed and not self.resumable:
            shutil.rmtree(self.folder, ignore_errors=True)

    def check_place(self) -> None:
        """Whether the folder may be put in its place.

        Raises:
            PlanError: a file, a mount point, or a folder that is not empty and may not be overwritten.
        """
        try:
            status = os.lstat(self.out)
        except FileNotFoundError:
            return
        except OSError as error:
            raise PlanError("the folder cannot be made", where=self.out, got=error.strerror) from None
        if not stat.S_ISDIR(status.st_mode):
            raise PlanError("the output is not a folder", where=self.out, hint="choose another output folder")
        if os.path.ismount(self.out):
            raise PlanError(
                "the output is a mount point and cannot be put in place in one step",
                where=self.out,
                hint=f"choose a folder inside it, like {self.out / 'model'}",
            )
        names = os.listdir(self.out)
        if not names:
            return
        if not self._overwrite:
            raise PlanError(
                "the output folder is not empty",
                where=self.out,
                got=", ".join(sorted(names)[:5]) + (" ..." if len(names) > 5 else ""),
                hint="choose another folder, or replace this one with --overwrite",
            )
        if not any(n == "config.json" or n.endswith(".safetensors") for n in names):
            raise PlanError(
                "the output folder is not empty and holds no model: it will not be overwritten",
                where=self.out,
                expected="config.json or *.safetensors in it",
                got=", ".join(sorted(names)[:5]) + (" ..." if len(names) > 5 else ""),
                hint="choose another folder, or empty this one",
            )
        strange = sorted(n for n in names if not any(fnmatch(n, pattern) for pattern in _MODEL_FILES))
        if strange:
            raise PlanError(
                "the output folder holds more than a model: it will not be overwritten",
                where=self.out,
                expected="only what a merge writes",
                got=", ".join(strange[:5]) + (" ..." if len(strange) > 5 else ""),
                hint="move these away, or choose another folder",
            )

    def check_apart(self, source: Path) -> None:
        """Whether the folder and a source are apart: neither is in the other.

        Raises:
            PlanError: they are not.
        """
        source = source.resolve()
        if self.out == source or source in self.out.parents or self.out in source.parents:
            raise PlanError(
                "the output and a source must not contain each other",
                where=self.out,
                expected="a folder beside the models",
                got=f"source {source}",
            )

    def _open_folder(self) -> None:
        if self.folder.is_symlink() or (self.folder.exists() and not self.folder.is_dir()):
            raise PlanError("the temporary folder's name is taken", where=self.folder, hint="remove it")
        if self.folder.exists():
            if self._resume:
                self._journal = Journal.reopen(self.folder, self._plan_hash, self._identity)
                if self._journal:
                    return
            elif not self._overwrite and (kept := Journal.count(self.folder)):
                raise PlanError(
                    "an unfinished run has left its work",
                    where=self.folder,
                    got=f"{kept} finished blocks",
                    hint="go on with --resume, or start over with --overwrite",
                )
            shutil.rmtree(self.folder)
        if self._resume:
            self.notes.append("there was nothing to resume: this is a fresh run")
        self.folder.mkdir()
        self._journal = Journal.create(self.folder, self._plan_hash, self._identity)

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
        with space_told(self.out):
            self._journal.append(batch)

    def _await_flush(self) -> None:
        if self._flushing is not None:
            flushing, self._flushing = self._flushing, None
            flushing.result()

    def _put_in_place(self) -> Path | None:
        """Rename; returns where the replaced folder is now."""
        if not self.out.exists() or not os.listdir(self.out):
            os.rename(self.folder, self.out)
            return None
        if exchange(self.folder, self.out):
            return self.folder
        old = self.out.parent / f".{self.out.name}.deus-old"
        if old.exists():
            shutil.rmtree(old)
        os.rename(self.out, old)
        try:
            os.rename(self.folder, self.out)
        except BaseException:
            os.rename(old, self.out)
            raise
        return old
