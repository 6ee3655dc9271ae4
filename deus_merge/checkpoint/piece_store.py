"""The folder next to an output in which workers, on any number of machines, put the pieces they have made.

::

    .OUT.deus-pieces/PLAN/       PLAN: the beginning of the plan's hash
        done/00003-of-00190.json the record of a finished piece, and the name of the folder that holds its files
        work/NAME/               the files of one attempt at a piece, finished or not

No lock is needed. Every attempt has a folder of its own, and a piece is finished when its record appears, which is one
rename after everything that it speaks of is on the disk. Where two workers made the same piece, the bytes are the same
and the later record replaces the earlier one. A worker that dies leaves a folder without a record.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..core.errors import MachineError
from ..core.typed_json import Misfit, dump, parse
from .staging import StagingArea
from .system import disk_errors, make_folder, sync_path, write_file

FORMAT = 1
_HASH_LETTERS = 16  # of the plan's hash in the name of a folder


@dataclass(frozen=True)
class PieceRecord:
    """What a worker says about a piece that it has finished.

    Attributes:
        format: The version of this format.
        piece: The name of the piece.
        plan_hash: The hash of the plan.
        identity: Everything else that decides the bytes, by name: JSON values.
        folder: The name of the folder below ``work/`` that holds its files.
        files: The size of each file in bytes.
        checksums: XXH3-128 of every tensor, in hex.
        blocks: What the manifest will say of each block, by the block's index in the plan.
        seconds: Wall time.
        received: XXH3-128, in hex, of tensors that were copied from other machines: of the bytes that came.
    """

    format: int
    piece: str
    plan_hash: str
    identity: Mapping[str, Any]
    folder: str
    files: Mapping[str, int]
    checksums: Mapping[str, str]
    blocks: Mapping[str, Any]
    seconds: float
    received: Mapping[str, str] = field(default_factory=dict)


class PieceStore:
    """The pieces of one plan for one output.

    Args:
        area: The output's path and the folders next to it.
        plan_hash: The hash of the plan.

    Attributes:
        out: The path of the output folder, links resolved.
        top: The folder of all pieces for this output, those of other plans included.
        folder: The folder of this plan's pieces.
    """

    def __init__(self, area: StagingArea, plan_hash: str):
        self.out = area.out
        self.top = area.pieces
        self.folder = self.top / plan_hash[:_HASH_LETTERS]
        self._plan_hash = plan_hash
        self._done, self._work = self.folder / "done", self.folder / "work"
        self._finished: set[str] = set()  # folders of attempts in this process that became pieces

    def record(self, piece: str) -> PieceRecord | None:
        """The record of a finished piece; None where there is none, or one that does not match its files.

        Args:
            piece: The name of the piece.
        """
        try:
            data = json.loads((self._done / f"{piece}.json").read_bytes())
            record = parse(PieceRecord, data)
            if (record.format, record.piece, record.plan_hash) != (FORMAT, piece, self._plan_hash):
                return None
            if Path(record.folder).name != record.folder:
                return None
            sizes = {name: os.lstat(path).st_size for name, path in self.files(record).items()}
        except (OSError, ValueError, RecursionError, Misfit):
            return None
        return record if sizes == dict(record.files) else None

    def any_record(self) -> PieceRecord | None:
        """The record of a finished piece of this plan; None where there is none."""
        names = sorted(path.stem for path in self._done.glob("*.json"))
        return next((record for name in names if (record := self.record(name))), None)

    def files(self, record: PieceRecord) -> dict[str, Path]:
        """Where the files of a finished piece are, by name."""
        return {name: self._work / record.folder / name for name in record.files}

    @contextmanager
    def attempt(self, piece: str) -> Iterator[Path]:
        """A new folder for one attempt at a piece, removed again unless `finish` was called for it.

        Raises:
            MachineError: no space left, or the disk fails.
        """
        folder = self._work / f"{piece}-{os.uname().nodename[:64]}-{os.getpid()}-{secrets.token_hex(4)}"
        with disk_errors(self.folder):
            make_folder(self._done)
            make_folder(self._work)
            folder.mkdir()
        try:
            yield folder
        finally:
            if folder.name not in self._finished:
                shutil.rmtree(folder, ignore_errors=True)

    def finish(self, record: PieceRecord) -> None:
        """Make an attempt the piece: bring its files to the disk, then its record.

        Raises:
            MachineError: no space left, the disk fails, or the pieces were removed meanwhile.
        """
        folder = self._work / record.folder
        name = f"{record.piece}.json"
        part = folder / f"{name}.part"
        if not self._done.is_dir():
            raise MachineError(
                "the pieces were removed while this one was made",
                where=self.folder,
                hint="another process has finished the output, or removed this folder",
            )
        with disk_errors(self.folder):
            for file in self.files(record).values():
                sync_path(file)
            write_file(part, (json.dumps(dump(record)) + "\n").encode())
            sync_path(part)
            sync_path(folder)
            sync_path(self._work)
            os.replace(part, self._done / name)
            sync_path(self._done)
        self._finished.add(record.folder)

    @property
    def other_plans(self) -> list[str]:
        """The names of folders with finished pieces of other plans for this output."""
        done = self.top.glob("*/done")
        return sorted(d.parent.name for d in done if d.parent != self.folder and any(d.glob("*.json")))

    def discard(self) -> None:
        """Remove the pieces of this plan, unfinished ones included.

        Raises:
            MachineError: something cannot be removed.
        """
        with disk_errors(self.folder):
            for folder in (self._done, self.folder):  # records first: without them the rest is only leftovers
                if folder.exists():
                    shutil.rmtree(folder)
            if self.top.exists() and not os.listdir(self.top):
                self.top.rmdir()
