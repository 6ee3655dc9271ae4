"""Where an output folder shall stand: what may be there already, and how the finished folder takes the place.

::

    OUT                  absent, or the folder that was there before, or the new one; always whole
    .OUT.deus-lock       held while a run writes
    .OUT.deus-tmp/       all that a run has made so far
        journal.jsonl    what is finished
        new/             the folder that becomes OUT
        old/             the folder that was OUT, where the two cannot be exchanged in one step
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
from fnmatch import fnmatch
from pathlib import Path

from ..core.errors import PlanError
from .journal import Journal
from .system import exchange, existing, is_mount, sync_path

# What --overwrite may take away: anything else in the folder is somebody's own.
_MODEL_FILES = (
    "*.safetensors", "*.json", "*.jinja", "*.model", "*.py", "vocab.txt", "merges.txt", "README.md", "deus_merge.yml",
    "report.html", "LICENSE*", "NOTICE*", "USE_POLICY*", ".gitattributes",
)  # fmt: skip


class Place:
    """A place for an output folder, and the names beside it.

    Args:
        out: Where the folder shall stand. A link is followed.

    Attributes:
        out: The place, links followed.
        workshop: The folder beside it that a run works in.
        new: The folder in the making.
        old: The folder that was replaced, until it is removed.
        lock: The lock file.

    Raises:
        PlanError: links that lead nowhere.
    """

    def __init__(self, out: Path | str):
        try:
            self.out = Path(out).resolve()
        except (OSError, RuntimeError) as error:  # Python before 3.13 calls a loop of links a RuntimeError
            raise PlanError("the output cannot be found", where=out, got=error) from None
        self.workshop = self.out.parent / f".{self.out.name}.deus-tmp"
        self.new, self.old = self.workshop / "new", self.workshop / "old"
        self.lock = self.out.parent / f".{self.out.name}.deus-lock"

    def check(self, overwrite: bool) -> None:
        """Whether a folder may be made here; touches nothing.

        Raises:
            PlanError: no folder can be made; a file, a mount point, or a folder that is not empty and may not be
                overwritten.
        """
        try:
            there = os.path.lexists(self.out)
            if there and not stat.S_ISDIR(os.lstat(self.out).st_mode):
                raise PlanError("the output is not a folder", where=self.out, hint="choose another output folder")
            if there and is_mount(self.out):
                raise PlanError(
                    "the output is a mount point and cannot be put in place in one step",
                    where=self.out,
                    hint=f"choose a folder inside it, like {self.out / 'model'}",
                )
            self._check_beside(there)
            names = os.listdir(self.out) if there else []
            if names:
                self._check_contents(names, overwrite)
                self._check_rights(self.out)  # it will be moved and removed
        except OSError as error:
            raise PlanError("the folder cannot be made", where=self.out, got=error.strerror) from None

    @property
    def taken(self) -> bool:
        """Whether the finished folder of the run whose journal lies here stands in its place."""
        whole = Journal.read(self.workshop).whole
        if whole is None or not self.out.exists():
            return False
        return os.stat(self.out).st_ino == whole or not self.new.exists()

    @property
    def unfinished(self) -> int:
        """How many blocks an interrupted run has finished here that are not in place."""
        return 0 if self.taken else len(Journal.read(self.workshop).finished)

    def take(self) -> None:
        """Put the new folder in place. Whatever stops this, `settle` brings it to an end.

        Raises:
            OSError: it cannot be renamed.
        """
        if not self.out.exists() or not os.listdir(self.out):
            os.rename(self.new, self.out)
        elif not exchange(self.new, self.out):
            os.rename(self.out, self.old)
            os.rename(self.new, self.out)
        self._sync()  # before anything of the old folder is removed

    def settle(self) -> None:
        """End what was stopped half-way: a replaced folder goes back, or goes away once the new one is in place.

        Raises:
            OSError: it cannot be renamed or removed.
        """
        if self.old.exists() and not self.out.exists():
            os.rename(self.old, self.out)
            self._sync()
        elif self.taken:
            self._sync()
            self.clear()

    def clear(self) -> None:
        """Remove the workshop; never the only copy of a folder that was to be replaced.

        Raises:
            OSError: something cannot be removed.
        """
        if self.old.exists() and not self.out.exists():
            return
        for folder in (self.new, self.old, self.workshop):  # the journal last: it tells what the others are
            if folder.exists():
                shutil.rmtree(folder)

    def _sync(self) -> None:
        sync_path(self.workshop)
        sync_path(self.out.parent)

    def _check_beside(self, there: bool) -> None:
        if self.workshop.is_symlink() or (self.workshop.exists() and not self.workshop.is_dir()):
            raise PlanError("the temporary folder's name is taken", where=self.workshop, hint="remove it")
        if there and self.old.exists() and not self.taken:
            raise PlanError(
                "an interrupted run has moved the folder that stood here, and another one has taken its place",
                where=self.out,
                got=f"the earlier one is kept: {self.old}",
                hint="move it away, or remove it",
            )
        parent = existing(self.out.parent)
        if not parent.is_dir():
            raise OSError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        self._check_rights(parent)
        longest = max(len(os.fsencode(name)) for name in (self.lock.name, *self.out.relative_to(parent).parts))
        if longest > os.pathconf(parent, "PC_NAME_MAX"):
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
        owners = (0, os.stat(parent).st_uid, os.stat(self.out).st_uid) if there else ()
        if there and os.stat(parent).st_mode & stat.S_ISVTX and os.geteuid() not in owners:
            raise PlanError("the output is somebody else's, who alone may rename it", where=self.out)

    def _check_rights(self, folder: Path) -> None:
        if not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
            raise PlanError("the folder cannot be made", where=self.out, got=f"no right to write in {folder}")

    def _check_contents(self, names: list[str], overwrite: bool) -> None:
        told = ", ".join(sorted(names)[:5]) + (" ..." if len(names) > 5 else "")
        if not overwrite:
            raise PlanError(
                "the output folder is not empty",
                where=self.out,
                got=told,
                hint="choose another folder, or replace this one with --overwrite",
            )
        if not any(n == "config.json" or n.endswith(".safetensors") for n in names):
            raise PlanError(
                "the output folder is not empty and holds no model: it will not be overwritten",
                where=self.out,
                expected="config.json or *.safetensors in it",
                got=told,
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
