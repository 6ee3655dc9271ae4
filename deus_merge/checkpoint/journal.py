"""The journal of an unfinished output folder: which blocks are whole on the disk.

One JSON object a line: first what the folder belongs to, then a line for each finished block, and at last the inode of
the finished folder, by which it is known again under its final name. A line is only written when what it speaks of is
on the disk, so every whole line can be trusted, and a torn last line is no line.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from ..core.errors import PlanError

FILENAME = "journal.jsonl"
FORMAT = 2


class Kept(NamedTuple):
    """What stands in a journal.

    Attributes:
        head: What the folder belongs to; None when not even that was written.
        finished: Block -> its diagnostics.
        whole: The inode of the folder when it is whole.
        length: Bytes that the whole lines take.
    """

    head: dict | None
    finished: dict[str, dict]
    whole: int | None
    length: int


class Journal:
    """An open journal. Use `create` or `reopen`.

    Attributes:
        finished: Block -> its diagnostics, in the order they were finished; only what is on the disk.
    """

    def __init__(self, path: Path, finished: Mapping[str, dict], fd: int):
        self.path = path
        self.finished = dict(finished)
        self._fd = fd

    @classmethod
    def create(cls, folder: Path, plan_hash: str, identity: Mapping[str, object]) -> Journal:
        """Begin a journal in a new folder."""
        path = folder / FILENAME
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o666)
        journal = cls(path, {}, fd)
        try:
            journal._write([{"format": FORMAT, "plan_hash": plan_hash, "identity": dict(identity)}])
        except BaseException:
            journal.close()
            raise
        return journal

    @classmethod
    def reopen(cls, folder: Path) -> Journal:
        """Go on with the journal of an interrupted run that `check` let pass."""
        path = folder / FILENAME
        kept = cls.read(folder)
        fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        os.ftruncate(fd, kept.length)
        return cls(path, kept.finished, fd)

    @staticmethod
    def check(folder: Path, plan_hash: str, identity: Mapping[str, object]) -> None:
        """Whether a run may go on with a folder's journal.

        Raises:
            PlanError: it belongs to another plan or identity, or another version wrote it.
        """
        path = folder / FILENAME
        head = Journal.read(folder).head or {}
        if head.get("format") != FORMAT:
            raise _other(path, "another version's journal", FORMAT, head.get("format"))
        # Compared first, since it can say what is different; a plan hash cannot.
        old, new = head.get("identity"), json.loads(json.dumps(dict(identity)))
        if old != new:
            old = old if isinstance(old, dict) else {}
            keys = sorted(k for k in old.keys() | new.keys() if old.get(k) != new.get(k))
            raise _other(
                path,
                f"the interrupted run had another {', '.join(keys)}",
                {k: old.get(k) for k in keys},
                {k: new.get(k) for k in keys},
            )
        if head.get("plan_hash") != plan_hash:
            raise _other(path, "the interrupted run had another plan", head.get("plan_hash"), plan_hash)

    def append(self, blocks: Iterable[tuple[str, dict]]) -> None:
        """Write finished blocks, and bring the lines to the disk."""
        blocks = list(blocks)
        self._write([{"block": block, "diagnostics": diagnostics} for block, diagnostics in blocks])
        self.finished.update(blocks)

    def seal(self, inode: int) -> None:
        """The folder of this inode is whole: nothing is left but to put it in its place."""
        self._write([{"whole": inode}])

    def close(self) -> None:
        fd, self._fd = self._fd, -1  # first, since an interrupt may come between any two steps: never close twice
        if fd >= 0:
            os.close(fd)

    def _write(self, lines: list[dict]) -> None:
        data = memoryview("".join(json.dumps(line) + "\n" for line in lines).encode())
        while data:
            data = data[os.write(self._fd, data) :]
        os.fdatasync(self._fd)

    @staticmethod
    def read(folder: Path) -> Kept:
        """What stands in a folder's journal: nothing when there is none."""
        try:
            raw = (folder / FILENAME).read_bytes()
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG):
                raise
            return Kept(None, {}, None, 0)
        head: dict | None = None
        finished: dict[str, dict] = {}
        whole, length = None, 0
        for line in raw.splitlines(keepends=True):
            try:
                value = json.loads(line) if line.endswith(b"\n") else None
            except ValueError:
                break
            if not isinstance(value, dict):
                break
            if head is None:
                head = value
            elif isinstance(value.get("block"), str) and isinstance(value.get("diagnostics"), dict):
                finished[value["block"]] = value["diagnostics"]
            elif isinstance(value.get("whole"), int):
                whole = value["whole"]
            else:
                break
            length += len(line)
        return Kept(head, finished, whole, length)


def _other(path: Path, message: str, expected: object, got: object) -> PlanError:
    return PlanError(
        f"cannot resume: {message}",
        where=path.parent,
        expected=expected,
        got=got,
        hint="run what was interrupted, or start over with --overwrite",
    )
