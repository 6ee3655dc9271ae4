"""The journal of an unfinished output folder: which blocks are whole on the disk.

One JSON object a line: first what the folder belongs to, then a line for each finished block. A line is only written
when the block's data is on the disk, so every whole line can be trusted, and a torn last line is no line.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from ..errors import PlanError

FILENAME = "journal.jsonl"
FORMAT = 1


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
        journal._write([{"format": FORMAT, "plan_hash": plan_hash, "identity": dict(identity)}])
        return journal

    @classmethod
    def reopen(cls, folder: Path, plan_hash: str, identity: Mapping[str, object]) -> Journal | None:
        """Go on with the journal of an interrupted run; None when nothing in it was finished.

        Raises:
            PlanError: it belongs to another plan or identity, or another version wrote it.
        """
        path = folder / FILENAME
        head, finished, length = _read(path)
        if head is None or not finished:
            return None
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
        fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        os.ftruncate(fd, length)
        return cls(path, finished, fd)

    @staticmethod
    def count(folder: Path) -> int:
        """How many finished blocks the journal of an unfinished folder knows."""
        return len(_read(folder / FILENAME)[1])

    def append(self, blocks: Iterable[tuple[str, dict]]) -> None:
        """Write finished blocks, and bring the lines to the disk."""
        blocks = list(blocks)
        self._write([{"block": block, "diagnostics": diagnostics} for block, diagnostics in blocks])
        self.finished.update(blocks)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _write(self, lines: list[dict]) -> None:
        data = memoryview("".join(json.dumps(line) + "\n" for line in lines).encode())
        while data:
            data = data[os.write(self._fd, data) :]
        os.fdatasync(self._fd)


def _read(path: Path) -> tuple[dict | None, dict[str, dict], int]:
    """The first line, the finished blocks, and the bytes that the whole lines take."""
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        return None, {}, 0
    head: dict | None = None
    finished: dict[str, dict] = {}
    length = 0
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
        else:
            break
        length += len(line)
    return head, finished, length


def _other(path: Path, message: str, expected: object, got: object) -> PlanError:
    return PlanError(
        f"cannot resume: {message}",
        where=path.parent,
        expected=expected,
        got=got,
        hint="run what was interrupted, or start over with --overwrite",
    )
