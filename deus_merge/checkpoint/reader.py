"""A checkpoint folder, read lazily: headers when it is opened, tensors on request, as views of mapped files."""

from __future__ import annotations

import hashlib
import math
import mmap
import os
import threading
import weakref
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from ..core.errors import CheckpointError, nearest, printable
from ..core.tensors import StoredTensor
from ..core.units import BITS, ITEMSIZE, torch_dtype
from .header import FileHeader, is_same_file, open_regular, parse_json, read_header, read_small, refuse_gguf
from .index import INDEX, SINGLE, single_file, weight_map
from .side_files import side_files
from .tensor_source import FileStamp, TensorSource, stamp

if TYPE_CHECKING:
    import torch

# Without this flag private writable mappings count against the commit limit: a shard larger than the memory must map.
_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0)


class Checkpoint:
    """One model folder. Use `open`; a context manager. Pickles, see `TensorSource`.

    Attributes:
        folder: The folder.
        config: config.json.
        tensors: Every tensor of every file, by name, in the order of files and offsets.
        files: The safetensors files, sorted by name.
        metadata: The ``__metadata__`` of the files, merged in their order.
        fingerprint: sha256 (hex) of config.json and of every file's name, size and header, not of the weights: it
            differs between checkpoints of different layout.
    """

    def __init__(self, folder: Path, config: dict, headers: Iterable[FileHeader], fingerprint: str):
        self.folder = folder
        self.config = config
        self.fingerprint = fingerprint
        self._headers = {header.file: header for header in headers}
        self.files = tuple(self._headers)
        self.metadata: Mapping[str, str] = {k: v for h in self._headers.values() for k, v in h.metadata.items()}
        tensors: dict[str, StoredTensor] = {}
        for header in self._headers.values():
            for tensor in header.tensors:
                if tensor.name in tensors:
                    raise CheckpointError(
                        f"tensor {tensor.name!r} is in two files",
                        where=header.file,
                        expected="each name once",
                        got=f"also in {tensors[tensor.name].file.name}",
                    )
                tensors[tensor.name] = tensor
        self.tensors: Mapping[str, StoredTensor] = MappingProxyType(tensors)
        self._fds: dict[Path, int] = {}
        weakref.finalize(self, _close_all, self._fds)  # in case `close` is never called
        self._lock = threading.Lock()  # read-ahead runs in another thread
        self._closed = False

    def __reduce__(self) -> tuple:  # without descriptors, lock and read-only views
        return type(self), (self.folder, self.config, self.headers, self.fingerprint)

    @classmethod
    def open(cls, folder: Path | str) -> Checkpoint:
        """Read config.json, the index and every header of a folder.

        Raises:
            CheckpointError: something is missing, malformed or inconsistent; the message names the file.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise CheckpointError("no such folder" if not folder.exists() else "not a folder", where=folder)
        if os.path.lexists(folder / "adapter_config.json") and not os.path.lexists(folder / "config.json"):
            hint = f"put the name of the adapted model in front: MODEL+{folder}"
            raise CheckpointError("the folder holds an adapter, not a model", where=folder, hint=hint)
        if not os.path.lexists(folder / "config.json") and (gguf := next(folder.glob("*.gguf"), None)):
            refuse_gguf(gguf)
        raw_config = read_small(folder / "config.json")
        config = parse_json(raw_config, folder / "config.json", "config")
        promised = weight_map(folder, INDEX, SINGLE, (".safetensors",))
        names = sorted(set(promised.values())) if promised is not None else [single_file(folder)]
        headers = [read_header(folder / name) for name in names]
        checkpoint = cls(folder, config, headers, checkpoint_fingerprint(raw_config, names, headers))
        checkpoint._check_promised(promised or {})
        return checkpoint

    def _check_promised(self, weight_map: Mapping[str, str]) -> None:
        """Check that every tensor is in the file that the index names."""
        paths = {file: self.folder / file for file in set(weight_map.values())}
        for name, file in weight_map.items():
            tensor = self.tensors.get(name)
            if tensor is None or tensor.file != paths[file]:
                raise CheckpointError(
                    f"the index promises tensor {name!r} in {file}",
                    where=self.folder / INDEX,
                    expected=f"the tensor in {file}",
                    got="no such tensor" if tensor is None else f"it is in {tensor.file.name}",
                )

    @property
    def headers(self) -> tuple[FileHeader, ...]:
        """The header of each file, in the order of `files`."""
        return tuple(self._headers.values())

    def __getitem__(self, name: str) -> StoredTensor:
        """The location of a tensor.

        Raises:
            CheckpointError: no tensor of this name.
        """
        try:
            return self.tensors[name]
        except KeyError:
            raise CheckpointError(
                f"no tensor {name!r}", where=self.folder, hint=nearest(name, self.tensors) if self.tensors else None
            ) from None

    def read(self, name: str) -> torch.Tensor:
        """A tensor in its stored dtype.

        Backed by a private mapping of its part of the file: no memory is taken until it is written to, writing to it
        changes neither the file nor another read, and its pages are freed together with it. It stays valid after
        `close`.

        Raises:
            CheckpointError: no such tensor, or the file has changed since `open`.
        """
        info = self[name]
        return self._view(info, info.shape, info.offset, info.nbytes)

    def slice(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows ``start`` to ``stop`` (half-open) of a tensor's first axis, as `read` gives them.

        Raises:
            CheckpointError: as `read`; also rows outside the tensor.
        """
        info = self._rows(name, start, stop)
        if math.prod(info.shape[1:]) * BITS[info.dtype] % 8:
            raise CheckpointError(f"tensor {name!r}: its rows do not fill whole bytes", where=info.file, got=info.dtype)
        row = info.nbytes // info.shape[0] if info.shape[0] else 0
        return self._view(info, (stop - start, *info.shape[1:]), info.offset + start * row, (stop - start) * row)

    def _rows(self, name: str, start: int, stop: int) -> StoredTensor:
        info = self[name]
        if not info.shape or not 0 <= start <= stop <= info.shape[0]:
            raise CheckpointError(
                f"tensor {name!r} does not have these rows",
                where=info.file,
                expected=f"within {info.shape}",
                got=(start, stop),
            )
        return info

    def prefetch(self, names: Iterable[str]) -> None:
        """Ask the kernel to read these tensors into its cache; returns before it has.

        Raises:
            CheckpointError: no such tensor, or a file has changed since `open`.
        """
        if hasattr(os, "posix_fadvise"):
            for file, begin, end in self._joined(names):
                os.posix_fadvise(self._descriptor(file), begin, end - begin, os.POSIX_FADV_WILLNEED)

    def _joined(self, names: Iterable[str]) -> list[tuple[Path, int, int]]:
        """File, first byte and end of tensors; adjacent ones together."""
        joined: list[tuple[Path, int, int]] = []
        for info in sorted((self[n] for n in names), key=lambda t: (t.file, t.offset)):
            if joined and joined[-1][0] == info.file and joined[-1][2] == info.offset:
                joined[-1] = (info.file, joined[-1][1], info.offset + info.nbytes)
            else:
                joined.append((info.file, info.offset, info.offset + info.nbytes))
        return joined

    def stamp(self) -> list[FileStamp]:
        return stamp(self.files)

    @property
    def where(self) -> object:
        return self.folder

    @property
    def folders(self) -> tuple[Path, ...]:
        return (self.folder,)

    @property
    def side_files(self) -> Mapping[str, bytes | Path]:
        return side_files(self.folder)

    @property
    def provenance(self) -> Mapping[str, object]:
        return {"folder": str(self.folder)}

    def root(self, name: str) -> tuple[Checkpoint, str]:
        return self, name

    def bound(self, results: Mapping[str, TensorSource]) -> Checkpoint:
        return self

    def workspace(self, name: str, minimum: bool = False) -> int:
        return 0

    def close(self) -> None:
        """Close the files. Tensors that were read stay valid."""
        with self._lock:
            _close_all(self._fds)
            self._closed = True

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Checkpoint({printable(self.folder)}, {len(self.tensors)} tensors in {len(self.files)} files)"

    def _view(self, info: StoredTensor, shape: tuple[int, ...], offset: int, nbytes: int) -> torch.Tensor:
        import torch

        dtype = torch_dtype(info.dtype)
        if BITS[info.dtype] < 8:  # torch has no such elements: their bytes
            shape = (*shape[:-1], nbytes // max(1, math.prod(shape[:-1])))
        if nbytes == 0:
            return torch.empty(shape, dtype=dtype)
        # One mapping a read, not one a file: a method that works in place must not change what a later read sees.
        start = offset // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
        mapped = self._map(info, start, offset + nbytes)
        raw = torch.frombuffer(mapped, dtype=torch.uint8, count=nbytes, offset=offset - start)  # (nbytes,)
        if offset % ITEMSIZE[info.dtype]:
            raw = raw.clone()  # other programs' files may have unaligned tensors, which cannot be viewed in their dtype
        return raw.view(dtype).view(shape)

    def _map(self, info: StoredTensor, begin: int, end: int) -> mmap.mmap:
        """Bytes ``begin`` (at a page) to ``end`` of a tensor's file, mapped privately."""
        return mmap.mmap(
            self._descriptor(info.file),
            end - begin,
            flags=mmap.MAP_PRIVATE | _NORESERVE,
            prot=mmap.PROT_READ | mmap.PROT_WRITE,
            offset=begin,
        )

    def _descriptor(self, file: Path) -> int:
        with self._lock:
            if self._closed:
                raise CheckpointError("the checkpoint is closed", where=self.folder)
            if file not in self._fds:
                self._fds[file] = open_regular(file)
            # A file that shrank would end in a bus error instead of a message.
            if not is_same_file(self._headers[file], os.fstat(self._fds[file])):
                raise CheckpointError("the file has changed since it was opened", where=file)
            return self._fds[file]


def _close_all(fds: dict[Path, int]) -> None:
    while fds:
        os.close(fds.popitem()[1])


def checkpoint_fingerprint(config: bytes, names: Sequence[str], headers: Sequence[FileHeader]) -> str:
    """`Checkpoint.fingerprint`, from the bytes of config.json and the headers of the files with these names."""
    digest = hashlib.sha256(b"deus-merge checkpoint 1\n")
    digest.update(hashlib.sha256(config).digest())
    for name, header in zip(names, headers, strict=True):
        digest.update(hashlib.sha256(name.encode()).digest() + header.size.to_bytes(8, "little") + header.digest)
    return digest.hexdigest()
