"""The header of a GGUF file, read strictly: sources are untrusted data.

The format: the magic, version, number of tensors and of metadata entries; the metadata; a table of tensors; from the
next aligned byte on, their data. Rows of the last axis are stored in whole blocks, so each row has bytes of its own.

Reference: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import hashlib
import importlib.util
import math
import mmap
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from ..core.errors import CheckpointError
from .header import check_name, file_identity, open_regular

CONVERT = (
    "use the original model, or convert this one: transformers' from_pretrained(folder, gguf_file=name), then"
    " save_pretrained(new_folder)"
)
_TRUNCATED = "the file is truncated or damaged; download or copy it again"
_VERSIONS = (2, 3)
_STRING, _ARRAY = 8, 9  # types of metadata values
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_MAX_DIMS = 4


@dataclass(frozen=True)
class GgufTensor:
    """A tensor of a GGUF file.

    Attributes:
        name: Its name in the file.
        type: The number of its type: one of `gguf.GGMLQuantizationType`.
        shape: Its sizes in the order of torch.
        offset: Its first byte, counted from the file's start.
        nbytes: Its size in bytes.
    """

    name: str
    type: int
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class GgufHeader:
    """The header of a GGUF file.

    Attributes:
        size: The file's size in bytes.
        identity: As of `FileHeader`.
        metadata: Its scalars and strings; of an array, the number of its elements.
        tensors: Its tensors by name, in the order of the file.
        digest: sha256 of all before the tensors' data.
    """

    size: int
    identity: tuple[int, ...]
    metadata: Mapping[str, object]
    tensors: Mapping[str, GgufTensor]
    digest: bytes


def read_gguf_header(path: Path) -> GgufHeader:
    """Read and check a GGUF file's header; no tensor is read.

    Raises:
        CheckpointError: ``gguf`` is not installed; or the file is malformed, truncated, in a version or byte order that
            is not read, or has tensors of an unknown type.
    """
    if importlib.util.find_spec("gguf") is None:
        hint = 'pip install "deus-merge[gguf]"'
        raise CheckpointError("GGUF files are read with gguf, which is not installed", where=path, hint=hint)
    fd = open_regular(path)
    with os.fdopen(fd, "rb") as stream:
        status = os.fstat(fd)
        if stream.read(4) != b"GGUF":
            _refuse(path, "not a GGUF file", expected="GGUF as its first bytes")
        with mmap.mmap(fd, 0, access=mmap.ACCESS_READ) as data:
            cursor = _Cursor(data, path)
            metadata, tensors = _tables(cursor)
            digest = hashlib.sha256(data[: cursor.at]).digest()
    return GgufHeader(status.st_size, file_identity(status), metadata, tensors, digest)


class _Cursor:
    """Reads values one after another."""

    def __init__(self, data: mmap.mmap, path: Path):
        self.data, self.path, self.at = data, path, 4

    def value(self, code: str):
        return self.values(code, 1)[0]

    def values(self, code: str, count: int) -> tuple:
        begin = self.at
        self.skip(count * struct.calcsize(code))
        return struct.unpack_from(f"<{count}{code}", self.data, begin)

    def skip(self, nbytes: int) -> None:
        self.at += nbytes
        if self.at > len(self.data):
            _refuse(self.path, "the header is longer than the file", got=f"{len(self.data)} bytes", hint=_TRUNCATED)

    def text(self) -> str:
        size = self.value("Q")
        begin = self.at
        self.skip(size)
        try:
            return self.data[begin : self.at].decode()
        except UnicodeDecodeError as error:
            return _refuse(self.path, "a string in the header is not UTF-8", got=str(error), hint=_TRUNCATED)

    def metadata_value(self) -> object:
        kind = self.value("I")
        if kind == _STRING:
            return self.text()
        if kind in _SCALARS:
            return self.value(_SCALARS[kind])
        if kind != _ARRAY:
            _refuse(self.path, "the metadata has a value of an unknown type", got=kind, hint=_TRUNCATED)
        element, count = self.value("I"), self.value("Q")
        if element in _SCALARS:
            self.skip(count * struct.calcsize(_SCALARS[element]))
        elif element == _STRING:
            for _ in range(count):
                self.skip(self.value("Q"))
        else:
            _refuse(self.path, "the metadata has an array of an unknown type", got=element, hint=_TRUNCATED)
        return count


def _tables(cursor: _Cursor) -> tuple[dict[str, object], dict[str, GgufTensor]]:
    """The metadata, and the tensors; the cursor is then at the end of their table."""
    path, version = cursor.path, cursor.value("I")
    if version not in _VERSIONS:
        _refuse(path, "a GGUF version that is not read", expected="2 or 3, little-endian", got=version, hint=CONVERT)
    count, entries = cursor.values("Q", 2)
    metadata: dict[str, object] = {}
    for _ in range(entries):
        key = cursor.text()
        if key in metadata:
            _refuse(path, f"the metadata has {key[:200]!r} twice")
        metadata[key] = cursor.metadata_value()
    table: dict[str, tuple[tuple[int, ...], int, int]] = {}
    for _ in range(count):
        name, dims = cursor.text(), cursor.value("I")
        check_name(name, path)
        if name in table or not 1 <= dims <= _MAX_DIMS:
            _refuse(path, f"tensor {name!r}: malformed entry", expected=f"one entry, of 1 to {_MAX_DIMS} sizes")
        table[name] = (cursor.values("Q", dims)[::-1], cursor.value("I"), cursor.value("Q"))
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1:
        _refuse(path, "general.alignment is not a positive number", got=alignment)
    start = -(-cursor.at // alignment) * alignment
    return metadata, {name: _tensor(cursor, name, start, *entry) for name, entry in table.items()}


def _tensor(cursor: _Cursor, name: str, start: int, shape: tuple[int, ...], kind: int, offset: int) -> GgufTensor:
    import gguf
    import numpy as np

    try:
        type_ = gguf.GGMLQuantizationType(kind)
        block, size = gguf.GGML_QUANT_SIZES[type_]
        gguf.dequantize(np.zeros((1, size), np.uint8), type_)  # (1, block)
    except (ValueError, KeyError, NotImplementedError):
        _refuse(
            cursor.path,
            f"tensor {name!r}: a type of values that gguf cannot dequantise",
            expected="floating point, or a quantised type",
            got=f"type {kind}",
            hint=f"a newer gguf may know it: pip install -U gguf; or {CONVERT}",
        )
    if shape[-1] % block or min(shape) < 1:
        _refuse(cursor.path, f"tensor {name!r}: its rows are not whole blocks of {block}", got=str(shape)[:100])
    nbytes, available = math.prod(shape) // block * size, len(cursor.data)
    if start + offset + nbytes > available:
        _refuse(
            cursor.path,
            f"tensor {name!r} ends after the end of the file",
            expected=f"a file of at least {start + offset + nbytes} bytes",
            got=f"{available} bytes",
            hint=_TRUNCATED,
        )
    return GgufTensor(name, kind, shape, start + offset, nbytes)


def _refuse(path: Path, message: str, *, expected=None, got=None, hint=None) -> NoReturn:
    raise CheckpointError(message, where=path, expected=expected, got=got, hint=hint)
