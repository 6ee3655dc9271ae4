"""Output shards, written at offsets that the layout decides, in any order and from any thread."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

import xxhash

from ..core.errors import PlanError, printable
from ..core.tensors import RemoteBytes, StoredTensor
from ..core.units import dtype_name, format_size
from .header import open_regular
from .layout import ShardLayout, TensorEntry
from .system import allocate, copy_range, disk_errors, free_space, sync_path, write_all

if TYPE_CHECKING:
    import torch

_ZEROS = bytes(1 << 20)


class ShardWriter:
    """All shards of one output folder, created at their full size.

    Args:
        folder: The folder of the files.
        shards: Their layouts.
        resume: Open the files of an interrupted run of the same plan instead of creating them.

    Attributes:
        bytes_written: Bytes of tensors written so far.
        received: XXH3-128, in hex, of each tensor that was copied from another machine: of the bytes that came.

    Raises:
        PlanError: no space for the files; or, on resume, a file is missing or was changed.
        MachineError: the disk fails.
    """

    def __init__(self, folder: Path, shards: Sequence[ShardLayout], *, resume: bool = False):
        self.folder = folder
        self.bytes_written = 0
        self.received: dict[str, str] = {}
        self._shards = {shard.filename: shard for shard in shards}
        self._shard_of = {name: shard for shard in shards for name in shard.tensors}
        self._fresh = set() if resume else set(self._shard_of)
        self._dirty: set[str] = set()
        self._lock = threading.Lock()
        self._fds: dict[str, int] = {}
        if not resume:
            self._check_space()
        try:
            with disk_errors(folder):
                for shard in shards:
                    self._fds[shard.filename] = self._reopen(shard) if resume else self._create(shard)
                sync_path(folder)
        except BaseException:
            self.close()
            raise

    def write(self, name: str, data: bytes | bytearray | memoryview, *, at: int | None = None) -> None:
        """Write a tensor's bytes.

        Args:
            name: The tensor.
            data: A contiguous buffer: all of it, or a part when ``at`` is given.
            at: The part's first byte, counted from the tensor's start.

        Raises:
            MachineError: no space left, or the disk fails.
        """
        shard, (begin, end) = self._find(name)
        view = memoryview(data).cast("B")
        size = end - begin
        if (len(view) != size) if at is None else not 0 <= at <= at + len(view) <= size:
            raise ValueError(f"{name}: {len(view)} bytes at {at or 0} do not fit a tensor of {size} bytes")
        with disk_errors(self.folder):
            write_all(self._fds[shard.filename], view, begin + (at or 0))
        self._wrote(shard, (name,), len(view))

    def write_tensor(self, name: str, tensor: torch.Tensor) -> None:
        """Write a tensor that already has the planned dtype and shape; it may be on any device.

        Raises:
            MachineError: no space left, or the disk fails.
        """
        import torch

        entry = self.entry(name)
        if tuple(tensor.shape) != entry.shape or str(tensor.dtype) != f"torch.{dtype_name(entry.dtype)}":
            raise ValueError(f"{name}: planned {entry.dtype} {entry.shape}, got {tensor.dtype} {tuple(tensor.shape)}")
        flat = tensor.detach().to("cpu").contiguous().reshape(-1)  # (numel,)
        self.write(name, flat.view(torch.uint8).numpy().data if flat.numel() else b"")

    def zeros(self, name: str) -> None:
        """Write zeros into a tensor.

        Raises:
            MachineError: no space left, or the disk fails.
        """
        shard, (begin, end) = self._find(name)
        if name in self._fresh:  # allocated bytes that were never written read as zeros
            self._wrote(shard, (name,), 0)
            return
        view = memoryview(_ZEROS)
        with disk_errors(self.folder):
            for at in range(begin, end, len(view)):
                write_all(self._fds[shard.filename], view[: end - at], at)
        self._wrote(shard, (name,), end - begin)

    def copy(self, name: str, source: StoredTensor) -> None:
        """Copy a tensor from another file; see `copy_many`."""
        self.copy_many([(name, source)])

    def copy_many(self, pairs: Iterable[tuple[str, StoredTensor]]) -> None:
        """Copy tensors of equal size from other files, file to file; those adjacent in both files go in one call. From
        another machine they are written as they come.

        Args:
            pairs: Output name and the stored tensor it comes from.

        Raises:
            CheckpointError: a source is missing or ends early.
            MachineError: no space left, or the disk fails.
        """
        runs: list[_Run] = []
        for name, source in sorted(pairs, key=lambda p: (str(p[1].file), p[1].offset)):
            shard, (begin, end) = self._find(name)
            if source.nbytes != end - begin:
                raise ValueError(f"{name}: {source.nbytes} bytes of {source.name} for {end - begin} bytes")
            if not (runs and runs[-1].extend(name, source, shard, begin)):
                runs.append(_Run(name, source, shard, begin))
        for run in runs:
            if run.remote is not None:
                self._receive(run, run.remote)
        for file, group in groupby((run for run in runs if run.remote is None), key=lambda run: run.file):
            fd = open_regular(file)
            try:
                for run in group:
                    with disk_errors(self.folder / run.shard.filename, f", copying {printable(file)}"):
                        target = self._fds[run.shard.filename]
                        copy_range(fd, run.source_offset, target, run.target_offset, run.length, file)
                    self._wrote(run.shard, run.names, run.length)
            finally:
                os.close(fd)

    def written_elsewhere(self, names: Iterable[str]) -> None:
        """Note that another process of this machine has written these tensors: `sync` must bring them to the disk."""
        for name in names:
            shard, (begin, end) = self._find(name)
            self._wrote(shard, (name,), end - begin)

    def _receive(self, run: _Run, remote: RemoteBytes) -> None:
        """Write the bytes of a run as they come, and take their checksums: they are never read from there again."""
        target, at = self._fds[run.shard.filename], run.target_offset
        tensors = iter(zip(run.names, run.sizes, strict=True))
        name, left = next(tensors)
        digest = xxhash.xxh3_128()
        with remote.stream(run.source_offset, run.source_offset + run.length) as pieces:
            for piece in pieces:
                with disk_errors(self.folder / run.shard.filename):
                    write_all(target, piece, at)
                at += len(piece)
                while True:
                    digest.update(piece[:left])
                    if len(piece) < left:
                        left -= len(piece)
                        break
                    piece = piece[left:]
                    self.received[name] = digest.hexdigest()
                    name, left = next(tensors, ("", 0))
                    digest = xxhash.xxh3_128()
                    if not name:
                        break
        while name:  # tensors without bytes, for which nothing came
            self.received[name] = digest.hexdigest()
            name, left = next(tensors, ("", 0))
        self._wrote(run.shard, run.names, run.length)

    @property
    def layouts(self) -> tuple[ShardLayout, ...]:
        """The layout of each file."""
        return tuple(self._shards.values())

    def __contains__(self, name: object) -> bool:
        """Whether one of the files has a tensor of this name."""
        return name in self._shard_of

    def entry(self, name: str) -> TensorEntry:
        """The planned name, dtype and shape of a tensor."""
        return self._find(name)[0].entries[name]

    def take_dirty(self) -> frozenset[str]:
        """Names of the files written to since the last call: those that `sync` must bring to the disk."""
        with self._lock:
            dirty, self._dirty = frozenset(self._dirty), set()
        return dirty

    def sync(self, filenames: Iterable[str]) -> None:
        """Sync the data of these files to the disk.

        Raises:
            MachineError: no space left, or the disk fails.
        """
        for filename in sorted(filenames):
            with disk_errors(self.folder):
                os.fdatasync(self._fds[filename])

    def close(self) -> None:
        while self._fds:
            os.close(self._fds.popitem()[1])

    def _find(self, name: str) -> tuple[ShardLayout, tuple[int, int]]:
        shard = self._shard_of[name]
        return shard, shard.tensors[name]

    def _wrote(self, shard: ShardLayout, names: Iterable[str], count: int) -> None:
        # After the write, never before: a file taken as clean in between is dirty again before its block is finished.
        with self._lock:
            self._dirty.add(shard.filename)
            self._fresh.difference_update(names)
            self.bytes_written += count

    def _check_space(self) -> None:
        # Before allocating: a file system may fill up completely before it refuses.
        needed, free = sum(shard.size for shard in self._shards.values()), free_space(self.folder)
        if needed > free:
            raise PlanError(
                "no space for the output",
                where=self.folder,
                expected=f"{format_size(needed)} free",
                got=f"{format_size(free)} free",
                hint="make room, or choose another output folder",
            )

    def _create(self, shard: ShardLayout) -> int:
        path = self.folder / shard.filename
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            allocate(fd, shard.size)
            write_all(fd, memoryview(shard.header), 0)
        except BaseException:
            os.close(fd)
            raise
        self._dirty.add(shard.filename)
        return fd

    def _reopen(self, shard: ShardLayout) -> int:
        path = self.folder / shard.filename
        fd = -1
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
            if os.fstat(fd).st_size == shard.size and os.pread(fd, len(shard.header), 0) == shard.header:
                return fd
            reason = "its size or header is not that of the interrupted run"
        except OSError as error:
            reason = error.strerror
        if fd >= 0:
            os.close(fd)
        raise PlanError("cannot resume", where=path, got=reason, hint="start over with --overwrite")


class _Run:
    """Adjacent bytes of one source file that become adjacent bytes of one shard."""

    def __init__(self, name: str, source: StoredTensor, shard: ShardLayout, begin: int):
        self.names, self.sizes, self.remote = [name], [source.nbytes], source.remote
        self.file, self.source_offset, self.length = source.file, source.offset, source.nbytes
        self.shard, self.target_offset = shard, begin

    def extend(self, name: str, source: StoredTensor, shard: ShardLayout, begin: int) -> bool:
        fits = (
            source.file == self.file
            and shard is self.shard
            and source.offset == self.source_offset + self.length
            and begin == self.target_offset + self.length
        )
        if fits:
            self.names.append(name)
            self.sizes.append(source.nbytes)
            self.length += source.nbytes
        return fits
