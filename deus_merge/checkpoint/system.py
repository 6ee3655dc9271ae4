"""The few calls the standard library lacks or wraps too thickly, each with its fallback."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

from ..core.errors import CheckpointError, MachineError, PlanError
from ..core.units import format_size

# EPERM: old container sandboxes answer so to calls they do not know.
_UNSUPPORTED = {errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM, errno.EBADF, errno.ETXTBSY}
_CALL_BYTES = 1 << 30  # one copy_file_range: large enough to cost nothing, small enough to be interrupted
_BUFFER_BYTES = 1 << 18  # pread/pwrite: stays in the cache; measured against 1 and 8 MiB
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of mallopt, in the GNU C library


def copy_range(source: int, source_offset: int, target: int, target_offset: int, length: int, name: object) -> None:
    """Copy bytes from file to file inside the kernel, or through a small buffer where it cannot.

    Args:
        source, target: Descriptors; their positions are not moved, so threads may share them.
        source_offset, target_offset, length: Bytes.
        name: The source, for messages.

    Raises:
        CheckpointError: the source ends early.
    """
    done = 0
    while done < length and hasattr(os, "copy_file_range"):
        try:
            count = os.copy_file_range(
                source, target, min(length - done, _CALL_BYTES), source_offset + done, target_offset + done
            )
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
            break
        if count == 0:  # the end of the file, or a file system that returns 0 for "unsupported": pread shows which
            break
        done += count
    if done == length:
        return
    buffer = memoryview(bytearray(min(_BUFFER_BYTES, length - done)))
    while done < length:
        count = os.preadv(source, [buffer[: length - done]], source_offset + done)
        if count == 0:
            raise CheckpointError(
                "the file ends early", where=name, expected=f"{source_offset + length} bytes", got=source_offset + done
            )
        write_all(target, buffer[:count], target_offset + done)
        done += count


def write_all(fd: int, data: memoryview, offset: int) -> None:
    """``os.pwrite`` until everything is written."""
    while data:
        count = os.pwrite(fd, data, offset)
        data, offset = data[count:], offset + count


def allocate(fd: int, size: int) -> None:
    """Give a new file its full size, with its blocks reserved where the file system can: a full disk shows at once.

    Not ``os.posix_fallocate``: where that is unsupported, the C library writes into every block instead.
    """
    os.ftruncate(fd, size)
    fallocate = libc_function("fallocate")
    if fallocate is None or size == 0:
        return
    while fallocate(fd, 0, ctypes.c_int64(0), ctypes.c_int64(size)) != 0:
        code = ctypes.get_errno()
        if code == errno.EINTR:
            continue
        if code in _UNSUPPORTED:
            return
        raise OSError(code, os.strerror(code))


def exchange(first: Path, second: Path) -> bool:
    """Swap two paths atomically; False where kernel or file system cannot."""
    renameat2 = libc_function("renameat2")
    if renameat2 is None:
        return False
    if renameat2(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in _UNSUPPORTED:
        return False
    raise OSError(code, os.strerror(code), str(second))


def write_file(path: Path, data: bytes) -> None:
    """Write a file, or replace its content."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
    try:
        write_all(fd, memoryview(data), 0)
    finally:
        os.close(fd)


def link_or_copy(source: Path, target: Path, *, link: bool = True) -> None:
    """Give a file a second name, or copy it where that cannot be. Nothing is done where ``target`` exists.

    Args:
        source: The file.
        target: Its other name, or its copy, which appears when it is whole.
        link: Whether it may be a second name.
    """
    if target.exists():
        return
    try:
        if link:
            os.link(source, target)
            return
    except OSError as error:
        if error.errno not in _UNSUPPORTED | {errno.EMLINK}:
            raise
    part = target.with_name(f"{target.name}.part")
    shutil.copyfile(source, part)
    os.replace(part, target)


def keep_freed_memory() -> None:
    """Let this process use its freed blocks of up to 32 MiB again, where the C library has a setting for it.

    A merge allocates the same few sizes all the time; given back, each would be mapped and zeroed anew.
    """
    mallopt = libc_function("mallopt")
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 32 << 20)
        mallopt(_M_TRIM_THRESHOLD, 64 << 20)


def sync_path(path: Path) -> None:
    """Sync a file, or a folder's list of names, to the disk."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):  # from file systems that cannot sync a folder
            raise
    finally:
        os.close(fd)


def make_folder(path: Path) -> None:
    """Create a folder and its missing parents, and sync their names to the disk."""
    if not path.is_dir():
        make_folder(path.parent)
        path.mkdir(exist_ok=True)
        sync_path(path.parent)


def existing(path: Path) -> Path:
    """The path itself, or the nearest folder above it that exists."""
    path = Path(path).absolute()
    while not path.exists():
        path = path.parent
    return path


def free_space(path: Path) -> int:
    """Bytes that this user can still write to the file system of ``path``, which need not exist."""
    status = os.statvfs(existing(path))
    return status.f_bavail * status.f_frsize


def is_mount(path: Path) -> bool:
    """Whether something is mounted at ``path``: a file system, or a folder of the same one (a bind mount)."""
    if os.path.ismount(path):
        return True
    try:
        table = Path("/proc/self/mountinfo").read_bytes()
    except OSError:
        return False
    points = (line.split()[4] for line in table.splitlines())
    return os.fsencode(path) in (re.sub(rb"\\([0-7]{3})", lambda m: bytes([int(m[1], 8)]), p) for p in points)


@contextmanager
def disk_errors(where: Path, doing: str = "") -> Iterator[None]:
    """Turn errors of the disk into a MachineError.

    Args:
        where: The file or folder that is written to, for errors that name none.
        doing: An addition to the message, where another file may be the cause.

    Raises:
        MachineError: no space left, an input/output error ...
    """
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise MachineError(
            ("no space left" if error.errno == errno.ENOSPC else error.strerror or str(error)) + doing,
            where=error.filename or where,
            got=f"{format_size(free_space(where))} free" if full else None,
            hint={errno.ENOSPC: "make room", errno.EFBIG: "choose a smaller --max-shard-size"}.get(error.errno or 0),
        ) from error


@contextmanager
def locked(path: Path, where: Path) -> Iterator[bool]:
    """Hold an exclusive lock on a lock file, which is removed afterwards.

    Yields:
        Whether the file system supports locks.

    Raises:
        PlanError: another process holds it.
    """
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        try:
            has_locks = _lock(fd, where)
        except BaseException:
            os.close(fd)
            raise
        if not has_locks:
            break
        # The holder before us may have removed the file between our open and our lock: then ours locks nothing.
        try:
            if os.path.samestat(os.stat(path), os.fstat(fd)):
                break
        except FileNotFoundError:
            pass
        os.close(fd)
    try:
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"process {os.getpid()} on {os.uname().nodename}\n".encode(), 0)
        yield has_locks
    finally:
        with suppress(OSError):  # a lock file without its process locks nothing
            path.unlink()
        os.close(fd)


def check_lock(path: Path, where: Path) -> None:
    """Check that `locked` would get the lock; changes nothing on the disk.

    Raises:
        PlanError: another process holds it.
    """
    with suppress(FileNotFoundError):
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            _lock(fd, where)
        finally:
            os.close(fd)


def _lock(fd: int, where: Path) -> bool:
    """Lock an open file; False where the file system does not support locks."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise PlanError(
            "another run is writing to this folder",
            where=where,
            got=os.pread(fd, 200, 0).decode(errors="replace").strip() or None,
            hint="wait for it, stop it, or choose another output folder",
        ) from None
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        return False
    return True


@cache
def libc_function(name: str) -> Callable[..., int] | None:
    """A function of the C library; None where it has no such function."""
    try:
        return getattr(ctypes.CDLL(None, use_errno=True), name)
    except (OSError, AttributeError):
        return None
