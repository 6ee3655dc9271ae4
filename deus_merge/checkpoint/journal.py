"""The journal of an unfinished output folder: which blocks are complete on the disk.

One JSON object a line: a head, then a line for each finished block, and at last the inode of the finished folder. A
line is written only after the data that it describes has been synced, so every complete line can be trusted, and an
incomplete last line is ignored. ``docs/journal.md`` specifies the format.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..core.errors import PlanError

FILENAME = "journal.jsonl"
FORMAT = 3


@dataclass(frozen=True)
class JournalHead:
    """The first line: the run that the folder belongs to.

    Attributes:
        format: The version of the format; the other fields are empty for a version that this code cannot read.
        plan_hash: Hash of the plan.
        identity: Everything else that decides the bytes of the output, by name: JSON values.
    """

    format: int
    plan_hash: str = ""
    identity: Mapping[str, object] = field(default_factory=dict)

    def to_json(self) -> dict[str, object]:
        return {"format": self.format, "plan_hash": self.plan_hash, "identity": dict(self.identity)}

    @classmethod
    def from_json(cls, value: dict) -> JournalHead:
        """Raises ValueError: not a head."""
        version = value.get("format")
        if type(version) is int and version != FORMAT:
            return cls(version)
        plan_hash, identity = value.get("plan_hash"), value.get("identity")
        if (
            value.keys() != {"format", "plan_hash", "identity"}
            or version != FORMAT
            or not isinstance(plan_hash, str)
            or not isinstance(identity, dict)
        ):
            raise ValueError("not the head of a journal")
        return cls(FORMAT, plan_hash, identity)


@dataclass(frozen=True)
class FinishedBlock:
    """The line of a block whose tensors are complete on the disk.

    Attributes:
        block: The block's name.
        diagnostics: What the run needs to know of it again: JSON values.
    """

    block: str
    diagnostics: dict

    def to_json(self) -> dict[str, object]:
        return {"block": self.block, "diagnostics": self.diagnostics}

    @classmethod
    def from_json(cls, value: dict) -> FinishedBlock:
        """Raises ValueError: not the line of a block."""
        block, diagnostics = value.get("block"), value.get("diagnostics")
        if value.keys() != {"block", "diagnostics"} or not isinstance(block, str) or not isinstance(diagnostics, dict):
            raise ValueError("not the line of a block")
        return cls(block, diagnostics)


@dataclass(frozen=True)
class FinishedFolder:
    """The last line: the whole folder is complete on the disk, and may get its final name.

    Attributes:
        inode: The folder's inode number, by which it is recognised under its final name.
    """

    inode: int

    def to_json(self) -> dict[str, object]:
        return {"folder_inode": self.inode}

    @classmethod
    def from_json(cls, value: dict) -> FinishedFolder:
        """Raises ValueError: not the line of a folder."""
        inode = value.get("folder_inode")
        if value.keys() != {"folder_inode"} or type(inode) is not int or inode < 0:
            raise ValueError("not the line of a finished folder")
        return cls(inode)


JournalLine = JournalHead | FinishedBlock | FinishedFolder


@dataclass(frozen=True)
class JournalContents:
    """What could be read of a journal.

    Attributes:
        head: Its first line; None when there is no journal, or not even that line is complete.
        finished: Block -> its diagnostics, in the order of the lines.
        folder_inode: The inode of the finished folder; None while it is unfinished.
        length: Size of the complete lines in bytes.
    """

    head: JournalHead | None = None
    finished: Mapping[str, dict] = field(default_factory=dict)
    folder_inode: int | None = None
    length: int = 0


def parse_line(line: bytes, first: bool) -> JournalLine:
    """One line of a journal.

    Args:
        line: Its bytes, the line feed included.
        first: Whether it is the first line.

    Raises:
        ValueError: it is incomplete, or not a line that may be there.
    """
    if not line.endswith(b"\n"):
        raise ValueError("the line is incomplete")
    value = json.loads(line)  # JSONDecodeError and UnicodeDecodeError are ValueErrors
    if not isinstance(value, dict):
        raise ValueError("the line is not a JSON object")
    if first:
        return JournalHead.from_json(value)
    return (FinishedFolder if "folder_inode" in value else FinishedBlock).from_json(value)


def read_journal(folder: Path) -> JournalContents:
    """The complete lines of a folder's journal; nothing when there is no journal.

    Args:
        folder: The staging folder.

    Raises:
        OSError: the file cannot be read.
    """
    try:
        raw = (folder / FILENAME).read_bytes()
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG):
            raise
        return JournalContents()
    head: JournalHead | None = None
    finished: dict[str, dict] = {}
    folder_inode, length = None, 0
    for text in raw.splitlines(keepends=True):
        try:
            line = parse_line(text, first=head is None)
        except (ValueError, RecursionError):
            break
        if isinstance(line, JournalHead):
            head = line
        elif isinstance(line, FinishedBlock):
            finished[line.block] = line.diagnostics
        else:
            folder_inode = line.inode
        length += len(text)
    return JournalContents(head, finished, folder_inode, length)


def check_journal(folder: Path, plan_hash: str, identity: Mapping[str, object]) -> None:
    """Check that a run may continue with a folder's journal.

    Args:
        folder: The staging folder.
        plan_hash, identity: Those of the run, see `JournalHead`.

    Raises:
        PlanError: it belongs to another plan or identity, or another version wrote it.
    """
    head = read_journal(folder).head
    if head is None or head.format != FORMAT:
        got = "no complete head" if head is None else f"format {head.format}"
        hint = "start over with --overwrite, or continue it with the version of deus_merge that began it"
        raise _refusal(folder, "the journal has another format", f"format {FORMAT}", got, hint)
    # Compared first: it can say what differs, and a plan hash cannot.
    old, new = head.identity, json.loads(json.dumps(dict(identity)))
    if names := sorted(k for k in old.keys() | new.keys() if old.get(k) != new.get(k)):
        raise _refusal(
            folder,
            f"the interrupted run had other values for: {', '.join(names)}",
            {name: old.get(name) for name in names},
            {name: new.get(name) for name in names},
        )
    if head.plan_hash != plan_hash:
        raise _refusal(folder, "the interrupted run had another plan", head.plan_hash, plan_hash)


class Journal:
    """A journal that is open for writing. Use `create` or `reopen`.

    Attributes:
        finished: Block -> its diagnostics, in the order they were finished; only blocks that are on the disk.
    """

    def __init__(self, path: Path, finished: Mapping[str, dict], fd: int):
        self.path = path
        self.finished = dict(finished)
        self._fd = fd

    @classmethod
    def create(cls, folder: Path, plan_hash: str, identity: Mapping[str, object]) -> Journal:
        """Begin a journal in a new folder.

        Raises:
            OSError: it cannot be written.
        """
        path = folder / FILENAME
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o666)
        journal = cls(path, {}, fd)
        try:
            journal._write([JournalHead(FORMAT, plan_hash, identity)])
        except BaseException:
            journal.close()
            raise
        return journal

    @classmethod
    def reopen(cls, folder: Path) -> Journal:
        """Continue the journal of an interrupted run that `check_journal` accepted; an incomplete line is cut off.

        Raises:
            OSError: it cannot be read or written.
        """
        path = folder / FILENAME
        contents = read_journal(folder)
        fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        os.ftruncate(fd, contents.length)
        return cls(path, contents.finished, fd)

    def append(self, blocks: Iterable[FinishedBlock]) -> None:
        """Write the lines of blocks whose data has been synced, and sync the lines.

        Raises:
            OSError: they cannot be written.
        """
        blocks = list(blocks)
        self._write(blocks)
        self.finished.update((line.block, line.diagnostics) for line in blocks)

    def finish(self, inode: int) -> None:
        """Record that the folder with this inode number is complete and synced.

        Raises:
            OSError: the line cannot be written.
        """
        self._write([FinishedFolder(inode)])

    def close(self) -> None:
        fd, self._fd = self._fd, -1  # first, since an interrupt may come between any two steps: never close twice
        if fd >= 0:
            os.close(fd)

    def _write(self, lines: Sequence[JournalLine]) -> None:
        data = memoryview("".join(json.dumps(line.to_json()) + "\n" for line in lines).encode())
        while data:
            data = data[os.write(self._fd, data) :]
        os.fdatasync(self._fd)


def _refusal(
    folder: Path,
    message: str,
    expected: object,
    got: object,
    hint: str = "run the interrupted command again, or start over with --overwrite",
) -> PlanError:
    return PlanError(
        f"cannot resume: {message}",
        where=folder,
        expected=expected,
        got=got,
        hint=hint,
    )
