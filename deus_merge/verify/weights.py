"""One pass over an output's weights: each byte is read once, hashed, and compared with what it should be. (Twice where
a trainer saved a tensor in a wider dtype, whose values are compared.)

Copies never pass through this process when they are written (the kernel makes them), so their bytes are seen here for
the first time: beside those of their source, 256 KiB at a time, small enough to stay in the processor's cache.

The checksum is XXH3-128. It finds damage (a flipped bit, a lost block), not malice: who can write to the folder can
write a new manifest, too. Measured on the processor of the benchmarks, one thread, from the cache: XXH3-128 51 GB/s,
BLAKE3 5.7 GB/s, SHA-256 1.8 GB/s.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import xxhash

from ..checkpoint.header import open_regular
from ..core.errors import CheckpointError
from ..core.tensors import StoredTensor
from ..core.units import torch_dtype

ALGORITHM = "xxh3_128"
ZEROS = "zeros"
_CHUNK = 1 << 18  # bytes

#: float dtype -> unsigned integers of its width, and the least magnitude (all bits but the sign) that is not finite
_NOT_FINITE = {
    "F64": ("<u8", 0x7FF0 << 48), "F32": ("<u4", 0x7F80 << 16), "F16": ("<u2", 0x7C00), "BF16": ("<u2", 0x7F80),
    "F8_E5M2": ("u1", 0x7C), "F8_E4M3": ("u1", 0x7F),
}  # fmt: skip


@dataclass(frozen=True)
class Wanted:
    """A stored tensor to look at.

    Attributes:
        tensor: Where it lies.
        like: A stored tensor of equal shape whose bytes it must have, or, in a dtype that holds them, whose values;
            ``ZEROS``; None: nothing to compare with.
    """

    tensor: StoredTensor
    like: StoredTensor | str | None

    @property
    def widened(self) -> bool:
        """Whether it is to hold the values of a tensor in another dtype, which it holds without loss."""
        return isinstance(self.like, StoredTensor) and self.like.dtype != self.tensor.dtype


@dataclass(frozen=True)
class Seen:
    """What was seen of a tensor.

    Attributes:
        checksum: XXH3-128 of its bytes, in hex.
        same: Whether it has the bytes it should have; None when there was nothing to compare with.
        finite: Whether it holds no NaN and no infinity; None when that was not looked at.
    """

    checksum: str
    same: bool | None
    finite: bool | None


def examine(wanted: Iterable[Wanted], *, finite: bool) -> dict[str, Seen]:
    """Read tensors once, in a few threads.

    Args:
        wanted: Which, and what each is compared with.
        finite: Also look for NaN and infinity.

    Returns:
        By name.

    Raises:
        CheckpointError: a file is gone, or ends early.
    """
    wanted = list(wanted)
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        seen = pool.map(lambda w: (_widened if w.widened else _examine)(w.tensor, w.like, finite), wanted)
        return {w.tensor.name: s for w, s in zip(wanted, seen, strict=True)}


def _examine(tensor: StoredTensor, like: StoredTensor | str | None, finite: bool) -> Seen:
    digest = xxhash.xxh3_128()
    same, finite = True, True if finite and tensor.dtype in _NOT_FINITE else None
    ours, theirs = memoryview(bytearray(_CHUNK)), memoryview(bytearray(_CHUNK))
    fds = [open_regular(tensor.file)]
    try:
        if isinstance(like, StoredTensor):
            fds.append(open_regular(like.file))
        for at in range(0, tensor.nbytes, _CHUNK):
            size = min(_CHUNK, tensor.nbytes - at)
            _fill(fds[0], ours[:size], tensor, at)
            digest.update(ours[:size])
            if len(fds) > 1:
                _fill(fds[1], theirs[:size], like, at)
            # What a last, shorter read leaves in both buffers was equal already, or the answer stands.
            same = same and (like is None or ours.obj == theirs.obj)
            if finite:
                finite = _is_finite(ours[:size], tensor.dtype)
    finally:
        for fd in fds:
            os.close(fd)
    return Seen(digest.hexdigest(), None if like is None else same, finite)


def _widened(tensor: StoredTensor, like: StoredTensor, finite: bool) -> Seen:
    """`_examine` of a tensor whose values are those of ``like`` in a wider dtype."""
    import torch

    seen = _examine(tensor, None, finite)
    ours, theirs = torch_dtype(tensor.dtype), torch_dtype(like.dtype)
    count = _CHUNK // max(ours.itemsize, theirs.itemsize)  # elements at a time
    total, same = tensor.nbytes // ours.itemsize, True
    fds = [open_regular(tensor.file), open_regular(like.file)]
    try:
        for at in range(0, total, count):
            size, parts = min(count, total - at), []
            for fd, info, dtype in ((fds[0], tensor, ours), (fds[1], like, theirs)):
                buffer = bytearray(size * dtype.itemsize)
                _fill(fd, memoryview(buffer), info, at * dtype.itemsize)
                parts.append(torch.frombuffer(buffer, dtype=dtype))
            same = same and torch.equal(parts[0].view(torch.uint8), parts[1].to(ours).view(torch.uint8))
    finally:
        for fd in fds:
            os.close(fd)
    return Seen(seen.checksum, same, seen.finite)


def _fill(fd: int, buffer: memoryview, tensor: StoredTensor, at: int) -> None:
    done = 0
    while done < len(buffer):
        count = os.preadv(fd, [buffer[done:]], tensor.offset + at + done)
        if count == 0:
            raise CheckpointError("the file ends early", where=tensor.file, got=f"no more bytes of {tensor.name}")
        done += count


def _is_finite(data: memoryview, dtype: str) -> bool:
    import numpy

    kind, least = _NOT_FINITE[dtype]
    bits = numpy.frombuffer(data, kind)
    magnitude = bits & bits.dtype.type((1 << 8 * bits.itemsize - 1) - 1)
    return int(magnitude.max()) < least
