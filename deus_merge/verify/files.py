"""The files of a finished output, wherever it is: in a folder of this machine, or in a bucket."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from pathlib import Path
from typing import Protocol

from ..checkpoint.dequantized import DequantizedSource
from ..checkpoint.header import read_small
from ..checkpoint.reader import Checkpoint
from ..checkpoint.side_files import PART, side_files
from ..checkpoint.storage import LoadOptions, open_sink, open_source
from ..core.urls import address_of


class OutputFiles(Protocol):
    """The files of an output."""

    def names(self) -> list[str]:
        """The names of all files; those in a folder that is part of a model are like ``1_Pooling/config.json``."""
        ...

    def read(self, name: str) -> bytes | None:
        """A small file; None where there is none."""
        ...

    def open(self) -> Checkpoint:
        """The weights as they are stored.

        Raises:
            CheckpointError: they cannot be opened, or are malformed.
        """
        ...

    @property
    def loaded(self) -> Path:
        """A folder of this machine with all files but weights, which transformers can load."""
        ...


class LocalFiles:
    """The files in a folder of this machine.

    Args:
        folder: The folder.
    """

    def __init__(self, folder: Path):
        self.loaded = folder

    def names(self) -> list[str]:
        return list(side_files(self.loaded))

    def read(self, name: str) -> bytes | None:
        path = self.loaded / name
        return read_small(path) if path.is_file() else None

    def open(self) -> Checkpoint:
        return Checkpoint.open(self.loaded)


class BucketFiles:
    """The files in a folder of a bucket.

    Args:
        address: Its address.

    Raises:
        PlanError, CheckpointError: as `open_sink`.
    """

    def __init__(self, address: str):
        self._address, self._sink = address, open_sink(address)
        self._read: dict[str, bytes | None] = {}
        self._loaded: Path | None = None

    def names(self) -> list[str]:
        objects, folders = self._sink.listed()
        parts = [part for part in folders if PART.fullmatch(part)]
        return sorted([*objects, *(f"{part}/{name}" for part in parts for name in self._sink.listed(part)[0])])

    def read(self, name: str) -> bytes | None:
        if name not in self._read:
            self._read[name] = self._sink.read(name)
        return self._read[name]

    def open(self) -> Checkpoint:
        opened = open_source(self._address, LoadOptions())
        stored = opened.stored if isinstance(opened, DequantizedSource) else opened
        assert isinstance(stored, Checkpoint)
        return stored

    @property
    def loaded(self) -> Path:
        if self._loaded is None:
            self._loaded = self._downloaded()
        return self._loaded

    def _downloaded(self) -> Path:
        folder = Path(tempfile.mkdtemp(prefix="deus-merge-verify-"))
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        for name in self.names():
            if not name.endswith(".safetensors"):
                (folder / name).parent.mkdir(exist_ok=True)
                (folder / name).write_bytes(self.read(name) or b"")
        return folder


def output_files(out: Path) -> OutputFiles:
    """The files of an output.

    Args:
        out: Its folder, or its address as a path.
    """
    address = address_of(out)
    return BucketFiles(address) if address else LocalFiles(out)
