"""Where an output folder is built, and how the finished folder gets its final name.

::

    OUT                  absent, or the folder that was there before, or the new one; always complete
    .OUT.deus-lock       held while a run writes
    .OUT.deus-tmp/       the staging folder: everything that a run has written so far
        journal.jsonl    what is finished, see docs/journal.md
        new/             the folder that becomes OUT
        old/             the folder that was OUT, where the two cannot be exchanged in one step
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
from collections.abc import Collection
from fnmatch import fnmatch
from pathlib import Path

from ..core.errors import PlanError
from ..core.text import some_of
from ..core.urls import address_of
from .journal import read_journal
from .side_files import PART
from .system import exchange, existing, is_mount, sync_path

# What --overwrite may remove: a folder with anything else belongs to the user.
_MODEL_FILES = (
    "*.safetensors", "*.json", "*.jinja", "*.model", "*.py", "vocab.txt", "merges.txt", "README.md", "deus_merge*.yml",
    "report.html", "license*", "licence*", "*_license*", "notice*", "copying", "use_policy*", ".gitattributes",
    "*.tiktoken", "tokenizer.model.v*", "*.spm", "vocab.bpe", "system_prompt.txt",
)  # fmt: skip


def check_local(path: Path | str, what: str = "the output", hint: str | None = None) -> None:
    """Check that a folder is a path of this machine, not an address like ``s3://bucket/model``; reads no disk.

    Args:
        path: The folder.
        what: What it is, for the message.
        hint: Advice; None to write to a local folder.

    Raises:
        PlanError: it is an address.
    """
    if address := address_of(path):
        raise PlanError(
            f"{what} must be on this machine",
            where=address,
            expected="a local folder",
            got=f"an address ({address.partition('://')[0]}://)",
            hint=hint or "write to a local folder, and upload that",
        )


class StagingArea:
    """The path of an output folder, and the folders next to it that a run works in.

    Args:
        out: The path of the output folder. Links are resolved.

    Attributes:
        out: The path, links resolved.
        staging: The folder next to it that holds an unfinished run.
        new: The output folder under construction, in `staging`.
        old: The replaced output folder until it is removed, in `staging`.
        lock: The lock file.
        pieces: The folder next to it in which workers put pieces of the output, see `piece_store`.

    Raises:
        PlanError: ``out`` is an address like ``s3://bucket/model``, or a loop of links.
    """

    def __init__(self, out: Path | str):
        check_local(out)
        try:
            self.out = Path(out).resolve()
        except (OSError, RuntimeError) as error:  # Python before 3.13 raises RuntimeError for a loop of links
            raise PlanError("the output path cannot be resolved", where=out, got=error) from None
        self.staging = self.out.parent / f".{self.out.name}.deus-tmp"
        self.new, self.old = self.staging / "new", self.staging / "old"
        self.lock = self.out.parent / f".{self.out.name}.deus-lock"
        self.pieces = self.out.parent / f".{self.out.name}.deus-pieces"

    def check(self, overwrite: bool) -> None:
        """Check that the output folder may be created here; changes nothing on the disk.

        Args:
            overwrite: Whether a model folder with this path may be replaced.

        Raises:
            PlanError: no folder can be created; or there is a file, a mount point, or a folder that is not empty and
                may not be overwritten.
        """
        try:
            exists = os.path.lexists(self.out)
            if exists and not stat.S_ISDIR(os.lstat(self.out).st_mode):
                raise PlanError("the output is not a folder", where=self.out, hint="choose another output folder")
            if exists and is_mount(self.out):
                raise PlanError(
                    "the output is a mount point, which cannot be replaced in one step",
                    where=self.out,
                    hint=f"choose a folder inside it, like {self.out / 'model'}",
                )
            self._check_parent(exists)
            names = os.listdir(self.out) if exists else []
            if names:
                self._check_contents(names, overwrite)
                self._check_rights(self.out)  # it will be moved and removed
        except OSError as error:
            raise PlanError("the output folder cannot be created", where=self.out, got=error.strerror) from None

    @property
    def committed(self) -> bool:
        """Whether the finished folder of the run whose journal is here already has its final name."""
        inode = read_journal(self.staging).folder_inode
        if inode is None or not self.out.exists():
            return False
        return os.stat(self.out).st_ino == inode or not self.new.exists()

    @property
    def resumable_blocks(self) -> int:
        """How many blocks of an interrupted run could be used again; 0 once its folder has its final name."""
        return 0 if self.committed else len(read_journal(self.staging).finished)

    def commit(self) -> None:
        """Give the new folder its final name. `recover` completes or reverts a commit that was interrupted.

        Raises:
            OSError: it cannot be renamed.
        """
        if not self.out.exists() or not os.listdir(self.out):
            os.rename(self.new, self.out)
        elif not exchange(self.new, self.out):
            os.rename(self.out, self.old)
            os.rename(self.new, self.out)
        self._sync()  # before anything of the old folder is removed

    def recover(self) -> None:
        """Complete or revert an interrupted `commit`: the old folder gets its name back, unless the new one has it.

        Raises:
            OSError: something cannot be renamed or removed.
        """
        if self.old.exists() and not self.out.exists():
            os.rename(self.old, self.out)
            self._sync()
        elif self.committed:
            self._sync()
            self.discard()

    def discard(self) -> None:
        """Remove the staging folder; does nothing while it holds the only copy of the folder to be replaced.

        Raises:
            OSError: something cannot be removed.
        """
        if self.old.exists() and not self.out.exists():
            return
        for folder in (self.new, self.old, self.staging):  # the journal last: it says what the others are
            if folder.exists():
                shutil.rmtree(folder)

    def _sync(self) -> None:
        sync_path(self.staging)
        sync_path(self.out.parent)

    def _check_parent(self, exists: bool) -> None:
        if self.staging.is_symlink() or (self.staging.exists() and not self.staging.is_dir()):
            raise PlanError("the name of the staging folder is taken", where=self.staging, hint="remove it")
        if exists and self.old.exists() and not self.committed:
            raise PlanError(
                "an interrupted run moved the earlier output away, and there is a new folder under its name",
                where=self.out,
                got=f"the earlier output is in {self.old}",
                hint="move the earlier output to another folder, or remove it",
            )
        parent = existing(self.out.parent)
        if not parent.is_dir():
            raise OSError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        self._check_rights(parent)
        longest = max(len(os.fsencode(name)) for name in (self.pieces.name, *self.out.relative_to(parent).parts))
        if longest > os.pathconf(parent, "PC_NAME_MAX"):
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
        owners = (0, os.stat(parent).st_uid, os.stat(self.out).st_uid) if exists else ()
        if exists and os.stat(parent).st_mode & stat.S_ISVTX and os.geteuid() not in owners:
            raise PlanError("the output belongs to another user, and only its owner may rename it", where=self.out)

    def _check_rights(self, folder: Path) -> None:
        if not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
            raise PlanError(
                "the output folder cannot be created", where=self.out, got=f"no permission to write in {folder}"
            )

    def _check_contents(self, names: list[str], overwrite: bool) -> None:
        if not overwrite:
            raise PlanError(
                "the output folder is not empty",
                where=self.out,
                got=some_of(sorted(names)),
                hint="choose another folder, or replace this one with --overwrite",
            )
        check_replaceable(names, self.out)


def check_replaceable(names: Collection[str], out: Path | str, *, unfinished: bool = False) -> None:
    """Check that a folder which is not empty holds a model and nothing else, so that an output may replace it.

    Args:
        names: What it holds.
        out: Its path, or its address.
        unfinished: Whether a run has left it unfinished, so that it need not hold a model.

    Raises:
        PlanError: it does not.
    """
    if not unfinished and not any(n == "config.json" or n.endswith(".safetensors") for n in names):
        raise PlanError(
            "the output folder is not empty and holds no model: it will not be overwritten",
            where=out,
            expected="config.json or *.safetensors in it",
            got=some_of(sorted(names)),
            hint="choose another folder, or empty this one",
        )
    if unknown := sorted(n for n in names if not is_model_file(n)):
        raise PlanError(
            "the output folder holds more than a model: it will not be overwritten",
            where=out,
            expected="only what a merge writes",
            got=some_of(unknown),
            hint="move these files away, or choose another folder",
        )


def is_model_file(name: str) -> bool:
    """Whether a folder of a model may have a file, or a folder, of this name."""
    return PART.fullmatch(name) is not None or any(fnmatch(name.lower(), p.lower()) for p in _MODEL_FILES)
