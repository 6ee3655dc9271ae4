"""Weights pickled by torch (``pytorch_model.bin``), read without running code that a pickle may contain.

`torch.load` unpickles with ``weights_only=True``: only tensors and plain containers.
"""

from __future__ import annotations

import hashlib
import os
import threading
import warnings
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import EllipsisType
from typing import TYPE_CHECKING

from ..core.errors import CheckpointError
from ..core.tensors import StoredTensor
from ..core.text import some_of
from ..core.units import dtype_name, stored_dtypes
from .header import FileHeader, check_content, check_name, file_identity, open_regular, parse_json, read_small
from .index import weight_map
from .reader import Checkpoint

if TYPE_CHECKING:
    import torch

SINGLE = "pytorch_model.bin"
INDEX = "pytorch_model.bin.index.json"
SUFFIXES = (".bin", ".pt", ".pth")
_NO_WEIGHTS = ("training_args", "optimizer", "scheduler", "rng_state")  # other files of trainers


class PickledCheckpoint(Checkpoint):
    """A model folder whose weights are pickled. Every tensor is derived: torch alone reads a pickle.

    A file in torch's format since 1.6 (a zip archive) is mapped, so it takes no more memory than a safetensors file. A
    file in the older format is loaded as a whole, one at a time.

    If several names share one tensor (tied embeddings), only the first is listed, unless config.json says that
    embeddings are not tied.

    Args:
        archives: The files in the newer format; the others are as of `Checkpoint`.
    """

    def __init__(
        self,
        folder: Path,
        config: dict,
        headers: Iterable[FileHeader],
        fingerprint: str,
        archives: frozenset[Path] = frozenset(),
    ):
        super().__init__(folder, config, headers, fingerprint)
        self._loading = threading.Lock()
        self._loaded: tuple[Path, Mapping[str, torch.Tensor]] | None = None  # the last file in the older format
        self._archives = archives

    def __reduce__(self) -> tuple:
        return type(self), (self.folder, self.config, self.headers, self.fingerprint, self._archives)

    @classmethod
    def open(cls, folder: Path | str) -> PickledCheckpoint:
        """Read config.json, the index, and names and shapes of every file.

        Raises:
            CheckpointError: as `Checkpoint.open`; or a pickle holds anything but tensors.
        """
        folder = Path(folder)
        raw_config = read_small(folder / "config.json")
        config = parse_json(raw_config, folder / "config.json", "config")
        promised = weight_map(folder, INDEX, SINGLE, SUFFIXES)
        names = sorted(set(promised.values())) if promised is not None else [_single(folder)]
        tied = config.get("tie_word_embeddings") is not False
        digest = hashlib.sha256(b"deus-merge pickled checkpoint 1\n" + hashlib.sha256(raw_config).digest())
        headers = []
        for name in names:
            header, stored = _examine(folder / name, tied)
            digest.update(hashlib.sha256(name.encode()).digest() + header.digest)
            headers.append(header)
            if missing := [t for t, file in (promised or {}).items() if file == name and t not in stored]:
                raise CheckpointError(f"the index promises tensor {missing[0]!r} in {name}", where=folder / INDEX)
        archives = frozenset(folder / name for name in names if _is_archive(folder / name))
        return cls(folder, config, headers, digest.hexdigest(), archives)

    def read(self, name: str) -> torch.Tensor:
        """As `Checkpoint.read`."""
        return self._part(self[name], ...)

    def slice(self, name: str, start: int, stop: int) -> torch.Tensor:
        """As `Checkpoint.slice`."""
        return self._part(self._rows(name, start, stop), slice(start, stop))

    def _part(self, info: StoredTensor, rows: slice | EllipsisType) -> torch.Tensor:
        """Rows of a tensor, in memory or in a mapping that no other tensor shares."""
        self._descriptor(info.file)  # refuses a file that has changed
        with self._loading:
            if self._loaded is None or self._loaded[0] != info.file:
                self._loaded = None  # before the next is loaded
                tensors, mapped = _load(info.file)
                if mapped:
                    return tensors[info.name].detach()[rows].contiguous()
                self._loaded = (info.file, tensors)
            return self._loaded[1][info.name].detach()[rows].clone()

    def workspace(self, name: str, minimum: bool = False) -> int:
        info = self[name]
        return 0 if info.file in self._archives else self._headers[info.file].size + info.nbytes

    def prefetch(self, names: Iterable[str]) -> None:
        """Ask the kernel to read the whole files of these tensors: only torch knows the offsets in them."""
        if hasattr(os, "posix_fadvise"):
            for file in {self[name].file for name in names}:
                os.posix_fadvise(self._descriptor(file), 0, 0, os.POSIX_FADV_WILLNEED)


def has_safetensors(folder: Path) -> bool:
    return any(entry.name.endswith((".safetensors", ".safetensors.index.json")) for entry in os.scandir(folder))


def _single(folder: Path) -> str:
    names = sorted(n for n in os.listdir(folder) if n.endswith(SUFFIXES) and not n.startswith(_NO_WEIGHTS))
    if SINGLE in names:
        return SINGLE
    if len(names) != 1:
        raise CheckpointError(
            "several pickled files and no index" if names else "no weights",
            where=folder,
            expected=f"safetensors, {SINGLE} or {INDEX}",
            got=some_of(names) or "neither",
        )
    return names[0]


def _examine(path: Path, tied: bool) -> tuple[FileHeader, frozenset[str]]:
    """A header with the names, dtypes and shapes of a file's tensors; and all names, those of tied tensors included."""
    fd = open_regular(path)
    try:
        check_content(os.pread(fd, 8, 0), path)
        status = os.fstat(fd)
    finally:
        os.close(fd)
    dtypes = stored_dtypes()
    infos: list[StoredTensor] = []
    seen = set()
    tensors, _ = _load(path)
    for name, tensor in tensors.items():
        _check_tensor(name, tensor, path, dtypes)
        view = (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.shape, tensor.stride())
        if tied and tensor.numel() and view in seen:
            continue
        seen.add(view)
        nbytes = tensor.numel() * tensor.element_size()
        infos.append(StoredTensor(name, dtypes[tensor.dtype], tuple(tensor.shape), path, 0, nbytes, derived=True))
    summary = repr([(i.name, i.dtype, i.shape) for i in infos]) + str(status.st_size)
    digest = hashlib.sha256(summary.encode()).digest()
    header = FileHeader(path, status.st_size, file_identity(status), tuple(infos), {}, digest)
    return header, frozenset(tensors)


def _check_tensor(name: object, tensor: object, path: Path, dtypes: Mapping[torch.dtype, str]) -> None:
    import torch

    if not isinstance(name, str):
        raise CheckpointError("the name of a tensor is not text", where=path, got=type(name).__name__)
    check_name(name, path)
    reason = None
    if not isinstance(tensor, torch.Tensor) or type(tensor) not in (torch.Tensor, torch.nn.Parameter):
        reason = f"is a {type(tensor).__name__}"
    elif tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.dtype not in dtypes:
        reason = f"is of {tensor.dtype}, {tensor.layout}, on {tensor.device}"
    elif tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        reason = f"claims the shape {list(tensor.shape)}, more than the file stores"
    if reason:
        raise CheckpointError(
            f"{name!r} {reason}",
            where=path,
            expected=f"a dense tensor of {', '.join(map(dtype_name, dtypes.values()))}",
            hint="only a flat mapping from names to tensors is read, as transformers saves it",
        )


def _load(path: Path) -> tuple[Mapping[str, torch.Tensor], bool]:
    """The content of a file, and whether it is mapped.

    Raises:
        CheckpointError: it holds more than tensors, or is damaged.
    """
    import torch

    mapped = _is_archive(path)
    try:
        if mapped:
            _check_archive(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of damaged files
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except CheckpointError:
        raise
    except Exception as error:  # a damaged or hostile pickle can make torch raise anything
        lines = str(error).splitlines() or [type(error).__name__]
        reason = next((line for line in lines if "GLOBAL" in line or line.startswith("Unsupported")), lines[0])
        raise CheckpointError(
            "the pickle is refused", where=path, expected="tensors and nothing else (weights_only=True)", got=reason
        ) from None
    if not isinstance(state, dict):
        raise CheckpointError("the file is not a mapping from names to tensors", where=path, got=type(state).__name__)
    return state, mapped


def _is_archive(path: Path) -> bool:
    """Whether a file has torch's newer format: the same test as torch's own."""
    with path.open("rb") as file:
        return file.read(4) == b"PK\3\4"


def _check_archive(path: Path) -> None:
    """Refuse compressed archives, which torch never writes: they can grow without bounds."""
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            if entry.compress_type != zipfile.ZIP_STORED or entry.file_size > entry.compress_size:
                raise CheckpointError("the archive is compressed", where=path, expected="as torch.save writes it")
