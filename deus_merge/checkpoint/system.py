"""The few calls the standard library lacks or wraps too thickly, each with its fallback."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from ..errors import CheckpointError, PlanError
from ..units import format_size

# EPERM is what old container sandboxes say to calls they do not know.
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
        name: What the source is called in messages.

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
        if count == 0:  # the end of the file, or a file system that says 0 for "cannot": pread tells which
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
    fallocate = _libc_call("fallocate")
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
    renameat2 = _libc_call("renameat2")
    if renameat2 is None:
        return False
    if renameat2(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in _UNSUPPORTED:
        return False
    raise OSError(code, os.strerror(code), str(second))


def keep_freed_memory() -> None:
    """Let this process use its freed blocks of up to 32 MiB again, where the C library can be told so.

    A merge allocates the same few sizes all the time; given back, each would be mapped and zeroed anew.
    """
    mallopt = _libc_call("mallopt")
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 32 << 20)
        mallopt(_M_TRIM_THRESHOLD, 64 << 20)


def sync_path(path: Path) -> None:
    """Bring a file, or a folder's list of names, to the disk."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def free_space(path: Path) -> int:
    """Bytes that this user can still write to the file system ``path`` is, or will be, on."""
    path = Path(path).absolute()
    while not path.exists():
        path = path.parent
    status = os.statvfs(path)
    return status.f_bavail * status.f_frsize


@contextmanager
def space_told(where: Path) -> Iterator[None]:
    """A full disk or quota as a PlanError.

    Raises:
        PlanError: no space left.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise PlanError(
            "no space left" if error.errno == errno.ENOSPC else "the disk quota is used up",
            where=where,
            got=f"{format_size(free_space(where))} free",
            hint="make room and run again with --resume, or choose another output folder",
        ) from error


@contextmanager
def locked(path: Path, where: Path) -> Iterator[bool]:
    """Hold an exclusive lock on a lock file, which is gone afterwards.

    Yields:
        Whether the file system has locks at all.

    Raises:
        PlanError: somebody else holds it.
    """
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(fd, 200, 0).decode(errors="replace").strip()
            os.close(fd)
            raise PlanError(
                "another run is writing to this folder",
                where=where,
                got=holder or None,
                hint="wait for it, stop it, or choose another output folder",
            ) from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
                os.close(fd)
                raise
            os.close(fd)
            fd = -1
            break
        # The holder before us may have removed the file between our open and our lock: then ours locks nothing.
        try:
            if os.path.samestat(os.stat(path), os.fstat(fd)):
                break
        except FileNotFoundError:
            pass
        os.close(fd)
    try:
        if fd >= 0:
            os.ftruncate(fd, 0)
            os.pwrite(fd, f"process {os.getpid()} on {os.uname().nodename}\n".encode(), 0)
        yield fd >= 0
    finally:
        path.unlink(missing_ok=True)
        if fd >= 0:
            os.close(fd)


@cache
def _libc_call(name: str):
    try:
        return getattr(ctypes.CDLL(None, use_errno=True), name)
    except (OSError, AttributeError):
        return None
