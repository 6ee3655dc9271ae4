"""The interface of a storage: a file of this folder each. What is not a path of this machine is read by range."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

from ...core.units import parse_size
from ..tensor_source import TensorSource
from ._sink import Sink
from ._spool import Spool

DEFAULT_CACHE_SIZE = "20GB"


@dataclass(frozen=True)
class LoadOptions:
    """How models are found and read.

    Attributes:
        allow_pickle: Also read pickled weights, of a model that has no safetensors.
        cache_dir: The hub's cache, and the folder of the spool; None for the default of huggingface_hub, and a folder
            for temporary files.
        stream: Read models of the hub by range, without a local copy.
        cache_size: The most bytes of models on other machines that are on the disk at once (the spool).
        patience: Seconds for which a request is tried again, once the server has answered before.
    """

    allow_pickle: bool = False
    cache_dir: Path | None = None
    stream: bool = False
    cache_size: int = parse_size(DEFAULT_CACHE_SIZE)
    patience: float = 300.0

    @cached_property
    def spool(self) -> Spool:
        """What has been read of models on other machines: one for all models that are opened with these options."""
        return Spool(self.cache_dir, self.cache_size)


class Storage(Protocol):
    """A place that models are read from. Exactly one storage takes each reference.

    Attributes:
        summary: One line about it.
        example: A reference.
    """

    summary: str
    example: str

    def takes(self, ref: str, options: LoadOptions) -> bool:
        """Whether a reference names a model in this storage; nothing is opened."""
        ...

    def open(self, ref: str, options: LoadOptions) -> TensorSource:
        """Read a model's config and headers.

        Raises:
            CheckpointError: it cannot be opened, or is malformed.
        """
        ...

    def sink(self, ref: str) -> Sink | None:
        """The folder with this address, to write an output to; nothing is asked of the store. None where outputs are
        not written through a `Sink`.

        Raises:
            CheckpointError: no address of this storage.
        """
        ...
