"""An error message in place of a crash when a mapped file becomes shorter, for which the kernel sends SIGBUS."""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
import threading
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from ..core.errors import CheckpointError
from .messages import label


def report_bus_errors() -> None:
    """Let a bus error end the process with a message and exit code 2.

    Python's own signal handlers run between two bytecode instructions, which a faulting instruction never reaches. This
    handler is called at the fault itself, in the faulting thread, and does not return.
    """
    if hasattr(signal, "SIGBUS"):
        ctypes.CDLL(None).signal(signal.SIGBUS, _handler())


@cache
def _handler():
    return ctypes.CFUNCTYPE(None, ctypes.c_int)(_report)


_reporting = threading.Lock()


def _report(signum: int) -> None:
    if not _reporting.acquire(blocking=False):
        time.sleep(60)  # several threads may fault at once; the first one ends the process
    try:
        error = CheckpointError(
            "the file became shorter while it was read",
            where=next(_shortened_files(), "a source"),
            hint="restore the file, and run again with --overwrite",
        )
        os.write(2, f"\n{label('error')} {error}\n".encode())
    finally:
        os._exit(CheckpointError.exit_code)


def _shortened_files() -> Iterator[str]:
    """Mapped files that end before their mapping ends."""
    try:
        lines = Path("/proc/self/maps").read_text(errors="surrogateescape").splitlines()
    except OSError:
        return
    for line in lines:
        addresses, _, offset, _, _, *path = line.split(maxsplit=5)
        if path and path[0].startswith("/") and os.path.isfile(path[0]):
            begin, end = (int(address, 16) for address in addresses.split("-"))
            whole_pages = -(-os.stat(path[0]).st_size // mmap.PAGESIZE) * mmap.PAGESIZE
            if whole_pages < int(offset, 16) + end - begin:
                yield path[0]
