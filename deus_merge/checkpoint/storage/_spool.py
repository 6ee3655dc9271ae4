"""What has been read of files on other machines: a part of each, in files without a name, within a bound.

A file is fetched in cells of `CELL` bytes. A cell is read only while it is pinned, and only after it was written in
full: a part that is not there is fetched, or the read fails. It never reads as zeros. The files of the spool have no
name (``O_TMPFILE``), so nobody else opens them, and the kernel frees them even when the process is killed.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import tempfile
import threading
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from ...core.errors import MachineError
from ...core.units import format_size
from ..system import disk_errors, libc_function, write_all
from ._threads import Threads
from ._transfer import Identity, Remote

CELL = 1 << 18  # bytes; a multiple of the page
PART = 8 << 20  # bytes of one request; a multiple of the cell
CONCURRENT = 8  # requests at once
_AHEAD = 4  # parts of a stream that are requested before they are needed
_KEEP_SIZE, _PUNCH_HOLE = 1, 2  # of fallocate
_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0)


@dataclass(frozen=True)
class RemoteFile:
    """A file of a store whose bytes are read through a spool (`core.tensors.RemoteBytes`). Pickles.

    Attributes:
        spool: The spool.
        remote: Its folder.
        name: Its name there.
        identity: Its size, and what tells it from another file of this name.
    """

    spool: Spool
    remote: Remote
    name: str
    identity: Identity

    @contextmanager
    def stream(self, begin: int, end: int) -> Iterator[Iterator[memoryview]]:
        """Bytes in order, past the spool; what the spool has is taken from there."""
        waiting: deque[Future[memoryview]] = deque()

        def pieces() -> Iterator[memoryview]:
            starts = iter(range(begin, end, PART))
            for start in starts:
                waiting.append(self.spool.submit(self.spool.part, self, start, min(start + PART, end)))
                if len(waiting) >= _AHEAD:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()

        try:
            yield pieces()
        finally:
            for future in waiting:
                future.cancel()

    @property
    def where(self) -> str:
        """Its address."""
        return f"{self.remote.name}/{self.name}"

    @property
    def key(self) -> tuple[str, str]:
        """What it has in the spool to itself: another revision of a file is another file."""
        return f"{self.remote.name} {self.remote.revision or self.identity}", self.name


class _Cell:
    """A part of a file in the spool: pinned while it is fetched, read or viewed."""

    __slots__ = ("pins", "present", "used")

    def __init__(self):
        self.pins, self.present, self.used = 0, False, False


_Key = tuple[str, str, int]  # folder, file, number of the cell


class Spool:
    """Parts of files on other machines, on the disk.

    Args:
        folder: Where its files without names are; None: the folder for large temporary files, ``TMPDIR`` or
            ``/var/tmp``.
        limit: The most bytes that it has. Those that were used least recently give way, never those in use.
    """

    def __init__(self, folder: Path | None, limit: int):
        self.folder, self.limit = folder, limit
        self._files: dict[tuple[str, str], IO[bytes]] = {}
        self._cells: OrderedDict[_Key, _Cell] = OrderedDict()  # the least recently used first
        self._state = threading.Condition()
        # views that are gone: finalizers may run in the middle of anything
        self._released: deque[list[_Cell]] = deque()
        self._ahead = 0  # calls of `prefetch` whose requests are not finished
        self._threads = Threads(CONCURRENT)
        self.bytes_fetched = 0

    def __reduce__(self) -> tuple:
        return type(self), (self.folder, self.limit)

    @property
    def size(self) -> int:
        """The bytes that it has, or makes room for."""
        return len(self._cells) * CELL

    def submit(self, function: Callable, *arguments: object) -> Future:
        """Call a function in one of the threads that make requests."""
        return self._threads.submit(function, *arguments)

    def view(self, file: RemoteFile, begin: int, end: int) -> mmap.mmap:
        """Map bytes ``begin`` (at a page) to ``end`` of a file; fetched first, where they are missing. They stay in the
        spool while the mapping lives.

        Raises:
            CheckpointError: as `Remote.range`.
            MachineError: also: more is in use at once than the spool may have, or no space left.
        """
        cells = self._pinned(file, begin, end)
        try:
            descriptor = self._file(file).fileno()
            protection = mmap.PROT_READ | mmap.PROT_WRITE
            flags = mmap.MAP_PRIVATE | _NORESERVE
            mapped = mmap.mmap(descriptor, end - begin, flags=flags, prot=protection, offset=begin)
        except BaseException:
            self._released.append(cells)
            raise
        weakref.finalize(mapped, self._released.append, cells).atexit = False
        return mapped

    def part(self, file: RemoteFile, begin: int, end: int) -> memoryview:
        """Bytes of a file: from the spool if all of them are there, else from the store, past the spool."""
        with self._state:
            found = [self._cells.get(key) for key in _keys(file, begin, end)]
            cells = [cell for cell in found if cell is not None and cell.present]
            whole = len(cells) == len(found)
            if whole:
                _pin(cells, 1)
        if not whole:
            return file.remote.range(file.name, begin, end, file.identity)
        try:
            buffer, done = memoryview(bytearray(end - begin)), 0
            while done < len(buffer):
                count = os.preadv(self._file(file).fileno(), [buffer[done:]], begin + done)
                if count == 0:
                    raise MachineError("the spool has lost data", where=file.where)
                done += count
            return buffer
        finally:
            self._released.append(cells)

    def prefetch(self, file: RemoteFile, begin: int, end: int) -> None:
        """Begin to fetch bytes of a file, if there is room for them without what is not used yet."""
        with self._state:
            missing = [key for key in _keys(file, begin, end) if key not in self._cells]
            if not missing or not self._make_room(len(missing), ahead=True):
                return
            cells = self._added(missing)
            self._ahead += 1
        parts = list(_parts(file, missing))
        waiting = len(parts)

        def fetch(keys: Sequence[_Key]) -> None:
            nonlocal waiting
            with suppress(Exception):  # whoever reads it meets the error again
                self._fetch(file, keys)
            with self._state:
                waiting -= 1
                if not waiting:
                    self._ahead -= 1
                    self._forget_failed(missing, cells)
                    _pin(cells, -1)
                    self._state.notify_all()

        for keys in parts:
            self.submit(fetch, keys)

    def _pinned(self, file: RemoteFile, begin: int, end: int) -> list[_Cell]:
        """The cells of these bytes, present and pinned."""
        while True:
            keys = _keys(file, begin, end)
            with self._state:
                missing = self._missing_with_room(keys)
                added = self._added(missing)
                cells = [self._cells[key] for key in keys]
                for key, cell in zip(keys, cells, strict=True):
                    cell.used = True
                    self._cells.move_to_end(key)
            try:
                fetching = [self.submit(self._fetch, file, part) for part in _parts(file, missing)]
                _all_results(fetching)
            except BaseException:
                with self._state:
                    self._forget_failed(missing, added)
                    _pin(cells, -1)
                    self._state.notify_all()
                raise
            with self._state:  # until others have fetched theirs
                while not all(cell.present for cell in cells):
                    if any(self._cells.get(key) is not cell for key, cell in zip(keys, cells, strict=True)):
                        break  # another thread failed to fetch it: now it is ours
                    self._state.wait()
                else:
                    return cells
                _pin(cells, -1)

    def _missing_with_room(self, keys: Sequence[_Key]) -> list[_Key]:
        """Pin the cells that are there, and make room for the others."""
        while True:
            missing = [key for key in keys if key not in self._cells]
            there = [self._cells[key] for key in keys if key in self._cells]
            _pin(there, 1)
            try:
                self._make_room(len(missing), ahead=False)
                return missing
            except MachineError:
                _pin(there, -1)
                if not self._ahead:
                    raise
            self._state.wait()  # what is being read ahead can give way once it is there

    def _added(self, keys: Iterable[_Key]) -> list[_Cell]:
        """New cells, pinned while they are fetched."""
        cells = []
        for key in keys:
            cell = self._cells[key] = _Cell()
            cell.pins = 1
            cells.append(cell)
        return cells

    def _forget_failed(self, keys: Iterable[_Key], cells: Iterable[_Cell]) -> None:
        for key, cell in zip(keys, cells, strict=True):
            if not cell.present and self._cells.get(key) is cell:
                del self._cells[key]

    def _fetch(self, file: RemoteFile, keys: Sequence[_Key]) -> None:
        """Fetch adjacent cells by one request, and write them."""
        begin, end = keys[0][2] * CELL, min((keys[-1][2] + 1) * CELL, file.identity.size)
        data = file.remote.range(file.name, begin, end, file.identity)
        with disk_errors(self._folder, ", keeping what was read of a model"):
            write_all(self._file(file).fileno(), data, begin)
        with self._state:
            self.bytes_fetched += len(data)
            for key in keys:
                self._cells[key].present = True
            self._state.notify_all()

    def _make_room(self, count: int, ahead: bool) -> bool:
        """Free cells until so many more fit.

        Args:
            count: How many cells will be added.
            ahead: Only free what was used, and free nothing if that is not enough.

        Returns:
            Whether they fit.

        Raises:
            MachineError: they do not fit, even without all that is not in use.
        """
        while self._released:
            _pin(self._released.popleft(), -1)
        excess = len(self._cells) + count - self.limit // CELL
        if excess <= 0:
            return True
        free = [key for key, cell in self._cells.items() if not cell.pins and (cell.used or not ahead)][:excess]
        if len(free) < excess:
            if ahead:
                return False
            raise MachineError(
                "more of the models is in use at once than the spool may hold",
                where="--cache-size",
                expected=f"at least {format_size((len(self._cells) + count - len(free)) * CELL)}",
                got=format_size(self.limit),
                hint="allow more with --cache-size",
            )
        for key in free:
            del self._cells[key]
        for (folder, name), numbers in _by_file(free).items():
            for first, last in _runs(numbers):
                self._punch(self._files[folder, name].fileno(), first * CELL, (last + 1 - first) * CELL)
        return True

    def _punch(self, descriptor: int, begin: int, count: int) -> None:
        """Give the disk back what part of a file takes."""
        fallocate = libc_function("fallocate")
        code = errno.ENOSYS
        if fallocate is not None:
            mode = _PUNCH_HOLE | _KEEP_SIZE
            if fallocate(descriptor, mode, ctypes.c_int64(begin), ctypes.c_int64(count)) == 0:
                return
            code = ctypes.get_errno()
        raise MachineError(
            "the file system cannot free a part of a file, which a spool with a bound needs",
            where=self._folder,
            got=os.strerror(code),
            hint="choose a folder on another file system with --cache-dir or TMPDIR, or a larger --cache-size",
        )

    @property
    def _folder(self) -> Path:
        return self.folder or Path(os.environ.get("TMPDIR") or "/var/tmp")

    def _file(self, file: RemoteFile) -> IO[bytes]:
        key = file.key
        with self._state:
            if key not in self._files:
                with disk_errors(self._folder):
                    self._folder.mkdir(parents=True, exist_ok=True)
                    made = tempfile.TemporaryFile(dir=self._folder, buffering=0)  # noqa: SIM115
                    made.truncate(file.identity.size)
                self._files[key] = made
            return self._files[key]


def _pin(cells: Iterable[_Cell], count: int) -> None:
    for cell in cells:
        cell.pins += count


def _keys(file: RemoteFile, begin: int, end: int) -> list[_Key]:
    return [(*file.key, i) for i in range(begin // CELL, -(-end // CELL))]


def _parts(file: RemoteFile, keys: Sequence[_Key]) -> Iterator[list[_Key]]:
    """Adjacent cells together, as many as one request may ask for."""
    for first, last in _runs([key[2] for key in keys]):
        for start in range(first, last + 1, PART // CELL):
            numbers = range(start, min(start + PART // CELL, last + 1))
            yield [(*file.key, i) for i in numbers]


def _runs(numbers: Iterable[int]) -> list[tuple[int, int]]:
    """The first and last of each run of consecutive numbers."""
    found: list[tuple[int, int]] = []
    for number in sorted(numbers):
        if found and found[-1][1] + 1 == number:
            found[-1] = (found[-1][0], number)
        else:
            found.append((number, number))
    return found


def _by_file(keys: Iterable[_Key]) -> dict[tuple[str, str], list[int]]:
    found: dict[tuple[str, str], list[int]] = {}
    for folder, name, number in keys:
        found.setdefault((folder, name), []).append(number)
    return found


def _all_results(futures: Sequence[Future]) -> None:
    """Wait for all; the first error is raised when none is running any more."""
    errors = [error for future in futures if (error := future.exception()) is not None]
    if errors:
        raise errors[0]
