"""Names, dtypes and shapes -> shards, headers and byte offsets. A pure function: reads no tensor and no file.

The offset of every output byte is known before any tensor is read, so any process can write blocks in any order.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from ..core.errors import PlanError
from ..core.units import BITS, ITEMSIZE, tensor_bytes
from .index import SINGLE

HEADER_ALIGNMENT = 8  # bytes; the header's end is a multiple, so that the tensors of every dtype are aligned


@dataclass(frozen=True)
class TensorEntry:
    """One output tensor: its name, safetensors dtype code and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return tensor_bytes(self.dtype, self.shape)


@dataclass(frozen=True)
class ShardLayout:
    """One output file. Pickles.

    Attributes:
        filename: Its name in the output folder.
        header: The file's first bytes, length prefix included.
        entries: Its tensors by name, in file order.
        tensors: Name -> (begin, end): absolute file offsets.
        size: The file's size in bytes.
    """

    filename: str
    header: bytes
    entries: Mapping[str, TensorEntry]
    tensors: Mapping[str, tuple[int, int]]
    size: int

    def __post_init__(self) -> None:
        for name in ("entries", "tensors"):
            object.__setattr__(self, name, MappingProxyType(dict(getattr(self, name))))

    def __reduce__(self) -> tuple:  # read-only views of mappings do not pickle
        return type(self), (self.filename, self.header, dict(self.entries), dict(self.tensors), self.size)


def plan_shards(blocks: Iterable[Sequence[TensorEntry]], max_shard_size: int) -> tuple[ShardLayout, ...]:
    """Split tensors into files, in the given order.

    Files end where blocks end, so that a file belongs to whole blocks: a file is filled with blocks until the next one
    would exceed the limit. A block larger than the limit has files of its own, each filled with its tensors until the
    next one would exceed the limit; a tensor larger than the limit has a file of its own. Within a file, wider dtypes
    come first (tensors of one width stay in order), so each tensor is aligned to its element size.

    Args:
        blocks: The tensors of each block, in layer order.
        max_shard_size: Limit of the tensors of one file in bytes.

    Returns:
        The files in order. A single one is called ``model.safetensors``.

    Raises:
        PlanError: no tensor, a duplicate name, a name or dtype that safetensors cannot hold.
    """
    groups: list[list[TensorEntry]] = []
    seen: set[str] = set()
    room = 0
    for block in blocks:
        for entry in block:
            _check_entry(entry, seen)
        parts = _parts(block, max_shard_size)
        for part in parts:
            size = sum(entry.nbytes for entry in part)
            if not groups or size > room or len(parts) > 1:
                groups.append([])
                room = max_shard_size
            groups[-1] += part
            room = room - size if len(parts) == 1 else -1  # a file of a split block takes no other block
    if not groups:
        raise PlanError("no tensor to write")
    total = len(groups)
    names = [SINGLE] if total == 1 else [f"model-{i:05d}-of-{total:05d}.safetensors" for i in range(1, total + 1)]
    return tuple(_layout(name, group) for name, group in zip(names, groups, strict=True))


def _parts(block: Sequence[TensorEntry], max_shard_size: int) -> list[list[TensorEntry]]:
    """The tensors of a block, in one part if the limit allows it, otherwise in one part per file."""
    parts: list[list[TensorEntry]] = [[]]
    filled = 0
    for entry in block:
        size = entry.nbytes
        if parts[-1] and filled + size > max_shard_size:
            parts.append([])
            filled = 0
        parts[-1].append(entry)
        filled += size
    return parts if parts[0] else []


def index_json(shards: Sequence[ShardLayout]) -> bytes:
    """``model.safetensors.index.json`` for these files, as transformers writes it."""
    total = sum(entry.nbytes for shard in shards for entry in shard.entries.values())
    weight_map = {name: shard.filename for shard in shards for name in shard.tensors}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    return (json.dumps(index, indent=2, sort_keys=True) + "\n").encode()


def _layout(filename: str, group: Sequence[TensorEntry]) -> ShardLayout:
    ordered = sorted(group, key=lambda entry: -ITEMSIZE[entry.dtype])
    table: dict[str, object] = {"__metadata__": {"format": "pt"}}
    ends: list[int] = []
    for entry in ordered:
        begin = ends[-1] if ends else 0
        ends.append(begin + entry.nbytes)
        table[entry.name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [begin, ends[-1]]}
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % HEADER_ALIGNMENT)
    header = len(text).to_bytes(8, "little") + text
    tensors, at = {}, len(header)
    for entry, end in zip(ordered, ends, strict=True):
        tensors[entry.name] = (at, len(header) + end)
        at = len(header) + end
    by_name = {entry.name: entry for entry in ordered}
    return ShardLayout(filename, header, by_name, tensors, at)


def _check_entry(entry: TensorEntry, seen: set[str]) -> None:
    if entry.name in seen:
        raise PlanError("duplicate name of an output tensor", where=entry.name, expected="each name once")
    seen.add(entry.name)
    if not entry.name or entry.name == "__metadata__" or not _encodes(entry.name):
        raise PlanError("not a valid tensor name", got=repr(entry.name))
    if entry.dtype not in BITS:
        raise PlanError("unknown dtype", where=entry.name, expected=" | ".join(BITS), got=repr(entry.dtype))
    if any(size < 0 for size in entry.shape):
        raise PlanError("a size is negative", where=entry.name, got=entry.shape)


def _encodes(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
