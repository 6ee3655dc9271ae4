"""One pass over an output's weights: each byte is read once, hashed, and compared with the expected one. (Tensors that
a trainer saved in a wider dtype are read twice: their values are compared.)

Copies do not pass through this process when they are written (the kernel copies them), so their bytes are read here for
the first time: together with those of their source, 256 KiB at a time, small enough to stay in the processor's cache.

The checksum is XXH3-128. It finds damage (a flipped bit, a lost block), not malice: anyone who can write to the
folder can also write a new manifest. Measured on the processor of the benchmarks, one thread, from the cache: XXH3-128
51 GB/s, BLAKE3 5.7 GB/s, SHA-256 1.8 GB/s.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import xxhash

from ..checkpoint.header import open_regular
from ..core.errors import CheckpointError
from ..core.tensors import StoredTensor
from ..core.units import torch_dtype

ALGORITHM = "xxh3_128"
ZEROS: Literal["zeros"] = "zeros"


@dataclass(frozen=True)
class Received:
    """The checksum of the bytes that came from another machine, in place of the bytes.

    Attributes:
        checksum: XXH3-128 in hex.
    """

    checksum: str


Expected = StoredTensor | Received | Literal["zeros"] | None
_CHUNK = 1 << 18  # bytes

#: float dtype -> unsigned integers of its width, and the smallest magnitude (all bits but the sign) that is not finite
_NOT_FINITE = {
    "F64": ("<u8", 0x7FF0 << 48), "F32": ("<u4", 0x7F80 << 16), "F16": ("<u2", 0x7C00), "BF16": ("<u2", 0x7F80),
    "F8_E5M2": ("u1", 0x7C), "F8_E4M3": ("u1", 0x7F), "C64": ("<u4", 0x7F80 << 16),
}  # fmt: skip
#: dtype -> the only byte that is not finite
_NAN = {"F8_E8M0": 0xFF, "F8_E4M3FNUZ": 0x80, "F8_E5M2FNUZ": 0x80}


@dataclass(frozen=True)
class TensorCheck:
    """A stored tensor to check.

    Attributes:
        tensor: Where it lies.
        expected: A stored tensor of equal shape whose bytes it must have, or, in a dtype that holds them, whose values;
            the checksum of its bytes; ``ZEROS``; None for nothing to compare with.
    """

    tensor: StoredTensor
    expected: Expected

    @property
    def widened(self) -> bool:
        """Whether it must hold the values of a tensor in a narrower dtype."""
        return isinstance(self.expected, StoredTensor) and self.expected.dtype != self.tensor.dtype


@dataclass(frozen=True)
class TensorResult:
    """The result of a `TensorCheck`.

    Attributes:
        checksum: XXH3-128 of its bytes, in hex.
        equal: Whether it has the expected bytes or values; None when there was nothing to compare with.
        finite: Whether it holds no NaN and no infinity; None when that was not checked.
    """

    checksum: str
    equal: bool | None
    finite: bool | None


def examine(checks: Iterable[TensorCheck], *, finite: bool) -> dict[str, TensorResult]:
    """Read tensors once, in up to four threads.

    Args:
        checks: The tensors, each with the one it is compared with.
        finite: Whether to look for NaN and infinity.

    Returns:
        The results by name.

    Raises:
        CheckpointError: a file is missing, or ends early.
    """
    checks = list(checks)
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        results = pool.map(lambda check: _examine(check, finite), checks)
        return {check.tensor.name: result for check, result in zip(checks, results, strict=True)}


def _examine(check: TensorCheck, finite: bool) -> TensorResult:
    tensor, expected = check.tensor, check.expected
    if isinstance(expected, StoredTensor) and check.widened:
        result = _compare_bytes(tensor, None, finite)
        return replace(result, equal=_equal_values(tensor, expected))
    return _compare_bytes(tensor, expected, finite)


def _compare_bytes(tensor: StoredTensor, expected: Expected, finite: bool) -> TensorResult:
    digest = xxhash.xxh3_128()
    equal, is_finite = True, True if finite and tensor.dtype in {*_NOT_FINITE, *_NAN} else None
    ours, theirs = bytearray(_CHUNK), bytearray(_CHUNK)
    compared = None if isinstance(expected, Received) else expected
    with ExitStack() as stack:
        fill = _reader(tensor, stack)
        fill_expected = _reader(expected, stack) if isinstance(expected, StoredTensor) else None
        for at in range(0, tensor.nbytes, _CHUNK):
            size = min(_CHUNK, tensor.nbytes - at)
            chunk = memoryview(ours)[:size]
            fill(chunk)
            digest.update(chunk)
            if fill_expected is not None:
                fill_expected(memoryview(theirs)[:size])
            # After a last, shorter read the rest of both buffers is equal, or a difference was found before.
            equal = equal and (compared is None or ours == theirs)
            if is_finite:
                is_finite = _is_finite(chunk, tensor.dtype)
    if isinstance(expected, Received):
        equal = digest.hexdigest() == expected.checksum
    return TensorResult(digest.hexdigest(), None if expected is None else equal, is_finite)


def _equal_values(tensor: StoredTensor, narrower: StoredTensor) -> bool:
    """Whether a tensor holds the values of another one, which has a narrower dtype."""
    import torch

    ours, theirs = torch_dtype(tensor.dtype), torch_dtype(narrower.dtype)
    count = _CHUNK // max(ours.itemsize, theirs.itemsize)  # elements at a time
    total, equal = tensor.nbytes // ours.itemsize, True
    with ExitStack() as stack:
        readers = ((_reader(tensor, stack), ours), (_reader(narrower, stack), theirs))
        for at in range(0, total, count):
            size, parts = min(count, total - at), []
            for fill, dtype in readers:
                buffer = bytearray(size * dtype.itemsize)
                fill(memoryview(buffer))
                parts.append(torch.frombuffer(buffer, dtype=dtype))  # (size,)
            equal = equal and torch.equal(parts[0].view(torch.uint8), parts[1].to(ours).view(torch.uint8))
    return equal


def _reader(tensor: StoredTensor, stack: ExitStack) -> Callable[[memoryview], None]:
    """A function that fills a buffer with the next bytes of a tensor, until ``stack`` is left."""
    if tensor.remote is not None:
        pieces = stack.enter_context(tensor.remote.stream(tensor.offset, tensor.offset + tensor.nbytes))
        return partial(_fill_from_pieces, pieces, [memoryview(b"")])
    fd = open_regular(tensor.file)
    stack.callback(os.close, fd)
    return partial(_fill_from_file, fd, tensor, [tensor.offset])


def _fill_from_pieces(pieces: Iterator[memoryview], rest: list[memoryview], buffer: memoryview) -> None:
    done = 0
    while done < len(buffer):
        piece = rest[0] if rest[0] else next(pieces)
        count = min(len(piece), len(buffer) - done)
        buffer[done : done + count] = piece[:count]
        rest[0], done = piece[count:], done + count


def _fill_from_file(fd: int, tensor: StoredTensor, at: list[int], buffer: memoryview) -> None:
    done = 0
    while done < len(buffer):
        count = os.preadv(fd, [buffer[done:]], at[0])
        if count == 0:
            raise CheckpointError("the file ends early", where=tensor.file, got=f"no more bytes of {tensor.name}")
        at[0], done = at[0] + count, done + count


def _is_finite(data: memoryview, dtype: str) -> bool:
    import numpy

    if dtype in _NAN:
        return not bool((numpy.frombuffer(data, "u1") == _NAN[dtype]).any())
    kind, smallest = _NOT_FINITE[dtype]
    bits = numpy.frombuffer(data, kind)
    magnitude = bits & bits.dtype.type((1 << 8 * bits.itemsize - 1) - 1)
    return int(magnitude.max()) < smallest
