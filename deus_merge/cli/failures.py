"""A file that is cut off while it is mapped: the kernel's answer is SIGBUS, ours is a message."""

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


def tell_bus_errors() -> None:
    """From now on a bus error ends the process with a message and exit code 2.

    Python's own signal handlers run between two instructions, and a fault never comes to the next one. This handler is
    called at the fault itself, by whatever thread it happens to, and does not return.
    """
    if hasattr(signal, "SIGBUS"):
        ctypes.CDLL(None).signal(signal.SIGBUS, _handler())


@cache
def _handler():
    return ctypes.CFUNCTYPE(None, ctypes.c_int)(_tell)


_first = threading.Lock()


def _tell(signum: int) -> None:
    if not _first.acquire(blocking=False):
        time.sleep(60)  # several threads compute, and each comes here; one ends them all
    try:
        error = CheckpointError(
            "the file became shorter while it was read",
            where=next(_cut_off(), "a source"),
            hint="put it back as it was, and run again with --overwrite",
        )
        os.write(2, f"\nerror: {error}\n".encode())
    finally:
        os._exit(CheckpointError.exit_code)


def _cut_off() -> Iterator[str]:
    """Mapped files that end before their mapping does."""
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
