"""Private folders for what a process makes before it is uploaded: in ``TMPDIR``, or else in ``/var/tmp``.

A folder is removed when its owner is done with it. What a killed process left is removed by the next one that needs
such a folder: a lock tells which are in use.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..core.errors import PlanError
from ..core.units import format_size
from .system import disk_errors, free_space, locked


def scratch_root() -> Path:
    """The folder of this user's scratch folders; it need not exist."""
    return Path(os.environ.get("TMPDIR") or "/var/tmp").absolute() / f"deus-merge-scratch-{os.getuid()}"


def check_scratch(nbytes: int) -> None:
    """Check that scratch folders can have so many bytes together.

    Raises:
        PlanError: they cannot.
    """
    root = scratch_root()
    if nbytes > (free := free_space(root)):
        raise PlanError(
            "too little space for the files that are made before they are uploaded",
            where=root,
            expected=format_size(nbytes),
            got=f"{format_size(free)} free",
            hint="set TMPDIR to a folder on a larger disk; a smaller --max-shard-size or fewer --workers need less",
        )


@contextmanager
def scratch_folder(name: str) -> Iterator[Path]:
    """A new folder, which is removed afterwards.

    Args:
        name: Its name, which no other one has.

    Raises:
        PlanError: the folder above it is another user's.
        MachineError: no space left, or the disk fails.
    """
    root = scratch_root()
    folder = root / name
    with disk_errors(root):
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        if os.lstat(root).st_uid != os.getuid() or root.is_symlink():
            raise PlanError(
                "the scratch folder belongs to somebody else", where=root, hint="set TMPDIR to another folder"
            )
        _sweep(root)
    with _held(folder):
        with disk_errors(root):
            folder.mkdir(mode=0o700)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _held(folder: Path) -> Iterator[bool]:
    with locked(folder.with_name(f"{folder.name}.lock"), folder) as has_locks:
        yield has_locks


def _sweep(root: Path) -> None:
    """Remove the folders of processes that are gone."""
    for folder in root.iterdir():
        if folder.is_dir():
            with suppress(PlanError, FileNotFoundError), _held(folder) as has_locks:  # PlanError: in use
                if has_locks:
                    shutil.rmtree(folder, ignore_errors=True)
