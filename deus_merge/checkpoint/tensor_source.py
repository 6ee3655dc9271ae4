"""The interface of everything that a plan reads: the tensors of a model, stored or derived."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

from ..core.errors import CheckpointError
from ..core.tensors import StoredTensor

if TYPE_CHECKING:
    import torch


class FileStamp(NamedTuple):
    """The state of a file.

    Attributes:
        name: Its name.
        size: Its size in bytes.
        modified: Its modification time in nanoseconds.
        tag: Of a file on another machine: its ETag or its commit, or that it has none; None for a file of this one.
    """

    name: str
    size: int
    modified: int
    tag: str | None = None


def stamp(files: Iterable[Path]) -> list[FileStamp]:
    """The stamp of each file of this machine.

    Raises:
        CheckpointError: a file does not exist any more.
    """
    try:
        return [FileStamp(f.name, status.st_size, status.st_mtime_ns) for f in files for status in [os.stat(f)]]
    except OSError as error:
        raise CheckpointError("the file cannot be read", where=error.filename, got=error.strerror) from None


class TensorSource(Protocol):
    """The tensors of one model as a plan reads them: a `Checkpoint`, or a source that derives some tensors from others.

    `StoredTensor.derived` marks the tensors that only `read` and `slice` can give; all others may be copied from file
    to file. Every source pickles: it then opens its files again when it reads, and still finds out if one has changed.
    """

    @property
    def where(self) -> object:
        """Its name in messages."""
        ...

    @property
    def folders(self) -> tuple[Path, ...]:
        """Every folder it reads, or the file where it reads only that."""
        ...

    @property
    def files(self) -> tuple[Path, ...]:
        """Every file it reads. One on another machine has a path that exists nowhere, see `core.urls.url_path`."""
        ...

    def stamp(self) -> list[FileStamp]:
        """The state of each of `files` now, by which a run, or one that is resumed, notices that one has changed.

        Raises:
            CheckpointError: a file does not exist any more.
        """
        ...

    @property
    def side_files(self) -> Mapping[str, bytes | Path]:
        """The files next to the weights (tokenizer, licence ...): name, in the form of `side_files.side_files`, -> its
        content, or a file to copy."""
        ...

    @property
    def provenance(self) -> Mapping[str, object]:
        """Its paths, for the manifest."""
        ...

    @property
    def config(self) -> dict:
        """As `Checkpoint.config`."""
        ...

    @property
    def tensors(self) -> Mapping[str, StoredTensor]:
        """As `Checkpoint.tensors`."""
        ...

    @property
    def fingerprint(self) -> str:
        """As `Checkpoint.fingerprint`."""
        ...

    def read(self, name: str) -> torch.Tensor:
        """As `Checkpoint.read`; a derived tensor may have a wider dtype than its `StoredTensor.dtype`."""
        ...

    def slice(self, name: str, start: int, stop: int) -> torch.Tensor:
        """As `Checkpoint.slice`: the same values as those rows of `read`."""
        ...

    def prefetch(self, names: Iterable[str]) -> None:
        """As `Checkpoint.prefetch`."""
        ...

    def root(self, name: str) -> tuple[TensorSource, str]:
        """The innermost source that a tensor comes from, and the tensor's name there: for a tensor that is not derived,
        the `Checkpoint` that stores its bytes."""
        ...

    def bound(self, results: Mapping[str, TensorSource]) -> TensorSource:
        """This source for one run, given the results of other documents of the run by name."""
        ...

    def workspace(self, name: str, minimum: bool = False) -> int:
        """Estimated bytes in memory while a tensor is read, itself included; 0 for a tensor that is only mapped.

        Args:
            name: The tensor.
            minimum: Assume that whatever computes it uses as little memory as it can.
        """
        ...
