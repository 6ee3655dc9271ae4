"""Matrices in files, for what does not fit into memory and takes long to compute again.

The files have no name, so that nothing of them is left, however the process ends. They lie in ``TMPDIR``, or else in
``/var/tmp``, and never take more than half of what is free there.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def matrix_on_disk(rows: int, columns: int, dtype: torch.dtype) -> Tensor | None:
    """A matrix (rows, columns) on the CPU whose memory the system writes to a file and frees when it needs some.

    Returns:
        None where the disk has no room, or no files can be made there.
    """
    import torch

    nbytes = rows * columns * dtype.itemsize
    try:
        with tempfile.TemporaryFile(dir=os.environ.get("TMPDIR") or "/var/tmp") as file:
            disk = os.fstatvfs(file.fileno())
            if nbytes > disk.f_bavail * disk.f_frsize // 2:
                return None
            os.posix_fallocate(file.fileno(), 0, nbytes)  # room that is missed later would end the process
            mapped = mmap.mmap(file.fileno(), nbytes)
    except (OSError, AttributeError):  # no such call on some systems
        return None
    return torch.frombuffer(mapped, dtype=dtype).view(rows, columns)
