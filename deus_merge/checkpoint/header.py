"""safetensors headers and JSON files, read strictly: sources are untrusted data.

The format: 8 bytes little-endian length, a JSON header of that length, then the tensors' bytes. We parse it ourselves
because straight copies need the offset of every tensor, and because an inconsistent file must be refused by name.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from ..core.errors import CheckpointError
from ..core.tensors import RemoteBytes, StoredTensor
from ..core.units import BITS, tensor_bytes

MAX_HEADER = 100_000_000  # bytes; the safetensors library's own bound
MAX_JSON = 100_000_000  # bytes of config.json or an index
MAX_NUMEL = 2**63 - 1  # elements; what a signed 64-bit size can hold
MAX_DIMS = 64
MAX_DEPTH = 64  # nesting levels of lists and objects
_POINTER, _GGUF = b"version https://git-lfs", b"GGUF"  # beginnings of files
MAX_DIGITS = 100  # of an integer: a tokenizer's "no limit" has 31
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


@dataclass(frozen=True)
class FileHeader:
    """The header of one safetensors file.

    Attributes:
        file: The file.
        size: Its size in bytes.
        identity: Device, inode, size and modification time; they must not change while the file is in use. A pickled
            header has only the last two, which a shared file has on every machine.
        tensors: Its tensors in file order.
        metadata: The header's ``__metadata__``.
        digest: sha256 over the length prefix and the header.
    """

    file: Path
    size: int
    identity: tuple[int, ...]
    tensors: tuple[StoredTensor, ...]
    metadata: Mapping[str, str]
    digest: bytes

    def __reduce__(self) -> tuple:
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return type(self), tuple((values | {"identity": self.identity[-2:]}).values())


def read_header(path: Path) -> FileHeader:
    """Read and check one safetensors file's header; no tensor is read.

    Raises:
        CheckpointError: not a regular file, unreadable, or a header that is malformed or does not fit the file.
    """
    fd = open_regular(path)
    with os.fdopen(fd, "rb") as stream:
        status = os.fstat(fd)
        prefix = stream.read(8)
        raw = stream.read(header_length(prefix, status.st_size, path))
    return parse_header(prefix + raw, status.st_size, file_identity(status), path)


def header_length(prefix: bytes, size: int, path: Path) -> int:
    """The length of a file's header without its length prefix.

    Args:
        prefix: The first 8 bytes of the file.
        size: The size of the file.
        path: The file, for messages.

    Raises:
        CheckpointError: not a safetensors file, or shorter than its header.
    """
    if len(prefix) < 8:
        _refuse(path, "too short for a safetensors file", expected="at least 8 bytes", got=f"{size} bytes")
    check_content(prefix, path)
    length = int.from_bytes(prefix, "little")
    if length > MAX_HEADER:
        _refuse(path, "the header is too long", expected=f"at most {MAX_HEADER} bytes", got=f"{length} bytes")
    if 8 + length > size:
        _refuse(
            path,
            "the header is longer than the file",
            expected=f"at most {size - 8} bytes",
            got=f"{length} bytes",
            hint="the download may be incomplete",
        )
    return length


def parse_header(
    begin: bytes, size: int, identity: tuple[int, ...], path: Path, remote: RemoteBytes | None = None
) -> FileHeader:
    """Check a header.

    Args:
        begin: The length prefix and the header.
        size: The size of the file.
        identity: As `FileHeader.identity`.
        path: The file.
        remote: Its bytes, where it is on another machine.

    Raises:
        CheckpointError: a header that is malformed or does not fit the file.
    """
    raw, length = begin[8:], len(begin) - 8
    if not raw.startswith(b"{"):
        _refuse(path, "the header is not JSON", expected="a header that begins with '{'", got=repr(raw[:1]))
    entries = parse_json(raw, path, "header")
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        _refuse(path, "__metadata__ is malformed", expected="an object of strings")
    tensors = [_tensor(name, entry, path, 8 + length, remote) for name, entry in entries.items()]
    tensors.sort(key=lambda t: (t.offset, t.nbytes))
    _check_cover(tensors, path, 8 + length, size)
    return FileHeader(path, size, identity, tuple(tensors), metadata, hashlib.sha256(begin).digest())


def check_name(name: str, path: Path) -> None:
    """Check the name of a tensor.

    Args:
        name: The name.
        path: Its file, for the message.

    Raises:
        CheckpointError: the name is empty, or has control characters.
    """
    if not name or _CONTROL.search(name):
        _refuse(path, "a tensor's name is empty or has control characters", got=repr(name[:200]))


def _tensor(name: str, entry: object, path: Path, data_start: int, remote: RemoteBytes | None) -> StoredTensor:
    check_name(name, path)
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        _refuse(
            path,
            f"tensor {name!r}: malformed entry",
            expected="an object of dtype, shape and data_offsets",
            got=sorted(entry) if isinstance(entry, dict) else type(entry).__name__,
        )
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        _refuse(path, f"tensor {name!r}: unknown dtype", expected=" | ".join(BITS), got=repr(dtype)[:100])
    if not _whole_numbers(shape) or len(shape) > MAX_DIMS:
        _refuse(path, f"tensor {name!r}: malformed shape", expected="sizes of at least 0", got=repr(shape)[:100])
    # The product without the zeros: a reader that multiplies the sizes must not overflow before it meets a zero.
    if tensor_bytes(dtype, [d for d in shape if d]) > MAX_NUMEL:
        _refuse(path, f"tensor {name!r}: the shape overflows", expected="less than 2^63 bytes", got=repr(shape)[:100])
    if not _whole_numbers(offsets) or len(offsets) != 2:
        _refuse(path, f"tensor {name!r}: malformed data_offsets", expected="[begin, end]", got=repr(offsets)[:100])
    begin, end = offsets
    if math.prod(shape) * BITS[dtype] % 8:
        _refuse(path, f"tensor {name!r}: its {dtype} elements do not fill whole bytes", got=repr(shape)[:100])
    nbytes = tensor_bytes(dtype, shape)
    if end - begin != nbytes:
        _refuse(
            path,
            f"tensor {name!r}: data_offsets do not fit dtype and shape",
            expected=f"{nbytes} bytes for {dtype} {shape}",
            got=f"{end - begin} bytes, [{begin}, {end}]",
        )
    return StoredTensor(name, dtype, tuple(shape), path, data_start + begin, nbytes, remote=remote)


def _check_cover(tensors: list[StoredTensor], path: Path, data_start: int, size: int) -> None:
    """The tensors, in order of their offsets, must cover the rest of the file exactly once."""
    at, before = data_start, "the header"
    for tensor in tensors:
        if tensor.offset != at:
            _refuse(
                path,
                f"tensor {tensor.name!r} {'overlaps' if tensor.offset < at else 'leaves a gap after'} {before}",
                expected=f"its first byte at {at - data_start}",
                got=tensor.offset - data_start,
            )
        at, before = tensor.offset + tensor.nbytes, repr(tensor.name)
    if at > size:
        _refuse(
            path,
            f"tensor {tensors[-1].name!r} ends after the end of the file",
            expected=f"a file of {at} bytes",
            got=f"{size} bytes",
            hint="the file is truncated; download or copy it again",
        )
    if at < size:
        _refuse(path, "bytes after the last tensor", expected=f"a file of {at} bytes", got=f"{size} bytes")


def parse_json(raw: bytes, where: Path, what: str) -> dict:
    """A JSON object, read strictly: no duplicate keys, no NaN or infinity, and bounds on digits and depth.

    Args:
        raw: The text in UTF-8.
        where: The file, for messages.
        what: What the file is, for messages: ``"config"``.

    Raises:
        CheckpointError: the text is not such an object.
    """

    def unique(pairs: list[tuple[str, object]]) -> dict:
        result = dict(pairs)
        if len(result) != len(pairs):
            seen: set[str] = set()
            double = next(k for k, _ in pairs if k in seen or seen.add(k))
            raise ValueError(f"duplicate key {double[:200]!r}")
        return result

    def finite(text: str) -> float:
        value = float(text)
        if not math.isfinite(value):
            raise ValueError(f"{text} is not a JSON number")
        return value

    def whole(text: str) -> int:
        if len(text) > MAX_DIGITS:
            raise ValueError(f"a number of {len(text)} digits")
        return int(text)

    try:
        value = json.loads(
            raw.decode(), object_pairs_hook=unique, parse_constant=finite, parse_float=finite, parse_int=whole
        )
        deep = _deeper_than(value, MAX_DEPTH)
    except RecursionError:
        value, deep = None, True
    except ValueError as error:  # also UnicodeDecodeError and JSONDecodeError
        _refuse(where, f"the {what} is not strict JSON", expected="one UTF-8 JSON object", got=str(error))
    if deep:
        _refuse(where, f"the {what} is nested too deeply", expected=f"at most {MAX_DEPTH} levels")
    if not isinstance(value, dict):
        _refuse(where, f"the {what} is not a JSON object", got=type(value).__name__)
    return value


def _deeper_than(value: object, levels: int) -> bool:
    """Whether lists and objects are nested more than ``levels`` deep."""
    row = [value] if isinstance(value, dict | list) else []
    for _ in range(levels):
        inner = (v for item in row for v in (item.values() if isinstance(item, dict) else item))
        row = [v for v in inner if isinstance(v, dict | list)]
        if not row:
            return False
    return True


def read_small(path: Path) -> bytes:
    """The bytes of a small regular file (config.json, an index).

    Raises:
        CheckpointError: as `open_regular`; or the file is larger than any such file should be.
    """
    with os.fdopen(open_regular(path), "rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        raw = stream.read(MAX_JSON + 1) if size <= MAX_JSON else b""
    if max(size, len(raw)) > MAX_JSON:
        _refuse(path, "the file is too large", expected=f"at most {MAX_JSON} bytes", got=f"{size} bytes")
    if raw.startswith(_POINTER):
        check_content(raw, path)
    return raw


def check_content(begin: bytes, path: Path) -> None:
    """Refuse what people often have in place of a model's file.

    Args:
        begin: The first 8 bytes of the file, or more.
        path: The file, for messages.

    Raises:
        CheckpointError: it is a Git LFS pointer or a GGUF file.
    """
    if begin[:8] == _POINTER[:8]:
        _refuse(
            path,
            "a Git LFS pointer, not the file itself",
            expected="the file that it points to",
            hint="fetch the files: git lfs install, then git lfs pull in that folder",
        )
    if begin[:4] == _GGUF:
        refuse_gguf(path)


def refuse_gguf(path: Path) -> NoReturn:
    """Refuse a GGUF file in a place where it is not read as a model.

    Raises:
        CheckpointError: always.
    """
    named = path.suffix.lower() == ".gguf"
    _refuse(
        path,
        "a GGUF file is read only as a model of its own",
        expected="safetensors",
        hint=f"name the file itself as the model: {path}" if named else "rename it to *.gguf, and name it as the model",
    )


def open_regular(path: Path) -> int:
    """A read-only descriptor of a regular file (links are followed).

    Raises:
        CheckpointError: missing, unreadable, or a folder, FIFO, socket or device.
    """
    try:
        # Checked before opening: to open a device can have effects. Not blocking: a FIFO may have come in between.
        regular = stat.S_ISREG(os.stat(path).st_mode)
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK) if regular else -1
    except FileNotFoundError:
        dangling = path.is_symlink()
        _refuse(path, "a link to a missing file" if dangling else "the file is missing")
    except (OSError, ValueError) as error:
        _refuse(path, "the file cannot be opened", got=getattr(error, "strerror", None) or str(error))
    if fd >= 0 and stat.S_ISREG(os.fstat(fd).st_mode):
        return fd
    if fd >= 0:
        os.close(fd)
    return _refuse(path, "not a regular file", expected="a file", got="a folder, FIFO, socket or device")


def is_same_file(header: FileHeader, status: os.stat_result) -> bool:
    """Whether an open file is the one that a header was read from, unchanged."""
    return file_identity(status)[-len(header.identity) :] == header.identity


def file_identity(status: os.stat_result) -> tuple[int, ...]:
    """Device, inode, size and modification time: they differ when a file was replaced or written to."""
    return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


def _whole_numbers(value: object) -> bool:
    return isinstance(value, list) and all(type(v) is int and 0 <= v <= MAX_NUMEL for v in value)


def _refuse(path: Path, message: str, *, expected=None, got=None, hint=None) -> NoReturn:
    raise CheckpointError(message, where=path, expected=expected, got=got, hint=hint)
