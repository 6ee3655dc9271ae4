"""A digest of a model's contents that takes no pass over its weights, for provenance.

`TensorSource.fingerprint` is of config and headers alone: all fine-tunes of a model have the same one. This digest also
has samples of every file: 4 KiB for every 4 MiB, evenly spaced with the first and the last bytes, at least 256; small
files as a whole. It is the same on every machine that has the same bytes, whatever the folder and the time stamps are.
Models with other weights differ in it; a change of a few numbers may be missed.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from ..core.errors import CheckpointError
from .header import open_regular
from .tensor_source import TensorSource

_SAMPLE = 4 << 10
_STRIDE = 4 << 20
_FEWEST = 256


def contents_digest(source: TensorSource) -> str:
    """sha256 in hex over the fingerprint and samples of every file of a source.

    Raises:
        CheckpointError: a file cannot be read.
    """
    digest = hashlib.sha256(b"deus-merge contents 1\n" + source.fingerprint.encode())
    for file in source.files:
        try:
            digest.update(_file_digest(file))
        except OSError as error:
            raise CheckpointError(f"the file cannot be read: {error.strerror}", where=file) from None
    return digest.hexdigest()


def _file_digest(file: Path) -> bytes:
    descriptor = open_regular(file)
    try:
        size = os.fstat(descriptor).st_size
        digest = hashlib.sha256(size.to_bytes(8, "little"))
        for offset in _offsets(size):
            digest.update(os.pread(descriptor, _SAMPLE, offset))
        return digest.digest()
    finally:
        os.close(descriptor)


def _offsets(size: int) -> list[int]:
    """Where the samples of a file begin."""
    count = max(_FEWEST, -(-size // _STRIDE))
    if size <= count * _SAMPLE:
        return list(range(0, size, _SAMPLE))
    last = size - _SAMPLE
    return [last * i // (count - 1) for i in range(count)]
