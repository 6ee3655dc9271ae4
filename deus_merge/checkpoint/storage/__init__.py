"""Opens a model reference as a tensor source, wherever the model is. Adding a storage is adding one file here."""

from __future__ import annotations

from collections.abc import Iterable

from ...core.errors import CheckpointError, PlanError
from ...core.urls import is_url, public_url
from ..tensor_source import TensorSource
from ._sink import Sink
from ._spool import RemoteFile
from ._transfer import Identity
from .base import DEFAULT_CACHE_SIZE, LoadOptions, Storage
from .registry import storages

__all__ = [
    "DEFAULT_CACHE_SIZE",
    "Identity",
    "LoadOptions",
    "Sink",
    "Storage",
    "divide_spools",
    "open_sink",
    "open_source",
    "storages",
]


def open_source(ref: str, options: LoadOptions) -> TensorSource:
    """Find a model and read its config and headers. Quantised weights are float tensors, see
    `dequantized.DequantizedSource`.

    Args:
        ref: A folder, ``org/name[@revision]`` on the hub, a GGUF file, or an address like ``s3://bucket/model``.
        options: How it is found and read.

    Raises:
        CheckpointError: no storage takes it; or as `Storage.open`.
    """
    for storage in storages().values():
        if storage.takes(ref, options):
            return storage.open(ref, options)
    raise CheckpointError(
        "no storage has such addresses",
        where=public_url(ref) if is_url(ref) else ref,
        expected=" | ".join(storage.example for storage in storages().values()),
    )


def open_sink(address: str) -> Sink:
    """The folder of a bucket that an output is written to, or was. Nothing is asked of the store.

    Args:
        address: Like ``s3://bucket/model``.

    Raises:
        PlanError: outputs cannot be written there.
        CheckpointError: as `Storage.sink`.
    """
    options = LoadOptions()
    for storage in storages().values():
        if storage.takes(address, options) and (sink := storage.sink(address)):
            return sink
    raise PlanError(
        "the output must be on this machine, or in a bucket",
        where=public_url(address),
        expected="a local folder, s3://bucket/model, gs://bucket/model or az://container/model",
        got=f"an address ({address.partition('://')[0]}://)",
        hint="write to a local folder, and upload that",
    )


def divide_spools(sources: Iterable[TensorSource], count: int) -> None:
    """Give the spools of sources a part of their bound, for one of several processes that each have their own."""
    remotes = (tensor.remote for source in sources for tensor in source.tensors.values())
    spools = {id(remote.spool): remote.spool for remote in remotes if isinstance(remote, RemoteFile)}
    for spool in spools.values():
        spool.limit //= count
