"""A GGUF file as a model: tensors are dequantised when they are read, under the names that transformers gives them.

What a file's config, names and values are in transformers is decided by transformers' own reader of GGUF files, and
blocks are dequantised by llama.cpp's package ``gguf``. Neither ever has the whole model in memory here.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ..core.errors import CheckpointError, nearest
from ..core.tensors import StoredTensor
from ..core.text import some_of
from .gguf_header import GgufHeader, GgufTensor, read_gguf_header
from .gguf_model import GgufModel, described, other_files
from .header import FileHeader
from .pickled import has_safetensors
from .reader import Checkpoint
from .tensor_source import FileStamp, TensorSource, stamp

if TYPE_CHECKING:
    import numpy as np
    import torch

_BLOCK_BYTES = 32 << 20  # of float32 values that are dequantised at once


class GgufSource:
    """The model of a GGUF file (`TensorSource`). Use `open`. Every tensor is derived, and read in float32. Pickles.

    Args:
        path: The file.
        header: Its header.
        model: The model that it stands for.
    """

    def __init__(self, path: Path, header: GgufHeader, model: GgufModel):
        self.where, self.files, self.folders = path, (path,), (path,)  # other files of its folder are not read
        self.provenance: Mapping[str, object] = {"folder": str(path)}
        self.config = model.config
        raw = [
            StoredTensor(name, "U8", _raw_shape(tensor), path, tensor.offset, tensor.nbytes)
            for name, tensor in header.tensors.items()
        ]
        file = FileHeader(path, header.size, header.identity, tuple(raw), {}, header.digest)
        self._raw = Checkpoint(path.parent, {}, (file,), "")  # under the names in the file
        self._model = model
        self._header = header
        self._side_files: dict[str, bytes | Path] | None = None  # not before they are asked for: it takes seconds
        digest = hashlib.sha256(b"deus-merge gguf 1\n" + header.size.to_bytes(8, "little") + header.digest)
        digest.update(json.dumps({**model.config, "transformers_version": None}, sort_keys=True).encode())
        self.fingerprint = digest.hexdigest()
        self.tensors: Mapping[str, StoredTensor] = {
            name: StoredTensor(name, model.dtype, model.shapes[name], path, 0, tensor.nbytes, derived=True)
            for name, tensor in model.tensors.items()
        }

    @classmethod
    def open(cls, path: Path | str) -> GgufSource:
        """Read a file's header, and find out what transformers makes of it.

        Args:
            path: The file, or a folder that holds one such file.

        Raises:
            CheckpointError: as `read_gguf_header` and `described`; or the folder holds several files.
        """
        path = _only_file(Path(path).expanduser().absolute())
        header = read_gguf_header(path)
        return cls(path, header, described(path, header))

    @property
    def side_files(self) -> Mapping[str, bytes | Path]:
        """The tokenizer as transformers converts it, and the generation config.

        Raises:
            CheckpointError: transformers cannot convert the tokenizer.
        """
        if self._side_files is None:
            self._side_files = dict(other_files(self.where, self._header, self.config))
        return self._side_files

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_side_files": None}

    def read(self, name: str) -> torch.Tensor:
        """A tensor in float32, in memory of its own."""
        info = self._info(name)
        return self._values(info, 0, info.shape[0])

    def slice(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows of `read`: where they are rows of the file, no others are dequantised."""
        info = self._info(name)
        if not 0 <= start <= stop <= info.shape[0]:
            what, expected = f"tensor {name!r} does not have these rows", f"within {info.shape}"
            raise CheckpointError(what, where=self.where, expected=expected, got=(start, stop))
        return self._values(info, start, stop)

    def prefetch(self, names: Iterable[str]) -> None:
        self._raw.prefetch([self._model.tensors[name].name for name in names])

    def stamp(self) -> list[FileStamp]:
        return stamp(self.files)

    def root(self, name: str) -> tuple[TensorSource, str]:
        return self, name

    def bound(self, results: Mapping[str, TensorSource]) -> GgufSource:
        return self

    def workspace(self, name: str, minimum: bool = False) -> int:
        values = 4 * math.prod(self._info(name).shape)
        copies = 1 if self._order(self._model.tensors[name]) is not None else 3
        return copies * values + 3 * _BLOCK_BYTES

    def __repr__(self) -> str:
        return f"GgufSource({self.where}, {len(self.tensors)} tensors)"

    def _info(self, name: str) -> StoredTensor:
        if name not in self.tensors:
            raise CheckpointError(f"no tensor {name!r}", where=self.where, hint=nearest(name, self.tensors))
        return self.tensors[name]

    def _values(self, info: StoredTensor, start: int, stop: int) -> torch.Tensor:
        """Rows ``start`` to ``stop`` of a tensor, (stop - start, ...)."""
        import numpy as np
        import torch

        stored = self._model.tensors[info.name]
        order = self._order(stored)
        if order is not None and stored.shape == info.shape:
            return torch.from_numpy(self._dequantized(stored, order[start:stop]))
        values = self._process(self._dequantized(stored, np.arange(stored.shape[0])), stored)
        if values.shape != info.shape:
            what = f"tensor {stored.name!r}: transformers makes another shape of it than {info.name} has"
            raise CheckpointError(what, where=self.where, expected=info.shape, got=values.shape)
        return torch.from_numpy(np.array(values[start:stop], np.float32, order="C"))

    def _dequantized(self, stored: GgufTensor, rows: np.ndarray) -> np.ndarray:
        """Rows of a tensor as the file has them, (len(rows), ...): dequantised a block at a time."""
        import gguf
        import numpy as np

        raw, kind = self._raw.read(stored.name).numpy(), gguf.GGMLQuantizationType(stored.type)
        if len(stored.shape) == 1:
            return np.array(gguf.dequantize(raw, kind)[0][rows], np.float32)
        values = np.empty((len(rows), *stored.shape[1:]), np.float32)
        step = max(1, _BLOCK_BYTES // (4 * math.prod(stored.shape[1:])))
        for at in range(0, len(rows), step):
            values[at : at + step] = gguf.dequantize(raw[rows[at : at + step]], kind)
        return values

    def _process(self, values: np.ndarray, stored: GgufTensor) -> np.ndarray:
        """What transformers makes of a tensor's values."""
        import numpy as np

        with np.errstate(all="ignore"):
            unused = {"tensor_key_mapping": {}, "parsed_parameters": {"tensors": {}}}
            return self._model.processor.process(weights=values, name=stored.name, **unused).weights

    def _order(self, stored: GgufTensor) -> np.ndarray | None:
        """Which row of the file each row is, (r,), where nothing else is changed; None where more is.

        Numbered rows show it: Llama's queries and keys have theirs in another order, most tensors as they are.
        """
        import numpy as np

        rows = np.arange(stored.shape[0])
        numbered = 2.0 * rows if len(stored.shape) == 1 else np.stack([2.0 * rows, 2.0 * rows + 1], axis=1)  # (r[, 2])
        try:
            found = self._process(numbered, stored)
        except (ValueError, IndexError):  # more depends on the number of columns
            return None
        if found is numbered:
            return rows
        if found.ndim != 2 or found.shape != numbered.shape or not np.isfinite(found).all():
            return None
        order = (found[:, 0] // 2).astype(np.int64)  # (r,)
        moved = np.array_equal(np.sort(order), rows) and np.array_equal(found, numbered[order])
        return order if moved else None


def is_gguf(ref: str) -> bool:
    """Whether a model reference names a GGUF file, or a folder with GGUF files, no config.json and no safetensors."""
    try:
        path = Path(ref).expanduser()
        return bool(ref) and (path.is_file() and _is_named(path) or path.is_dir() and bool(_files(path)))
    except (OSError, ValueError, RuntimeError):  # a name that no file can have, or a user that does not exist
        return False


def _files(folder: Path) -> list[Path]:
    if os.path.lexists(folder / "config.json") or has_safetensors(folder):
        return []
    return sorted(file for file in folder.iterdir() if _is_named(file))


def _is_named(file: Path) -> bool:
    return file.suffix.lower() == ".gguf"


def _only_file(path: Path) -> Path:
    if not path.is_dir():
        return path
    if len(found := _files(path)) == 1:
        return found[0]
    hint = f"name one of them: {found[0]}" if found else None
    got = some_of(file.name for file in found) or "none"
    raise CheckpointError("several GGUF files", where=path, expected="one GGUF file", got=got, hint=hint)


def _raw_shape(tensor: GgufTensor) -> tuple[int, int]:
    """The bytes of a tensor's rows; a vector is one row."""
    rows = tensor.shape[0] if len(tensor.shape) > 1 else 1
    return rows, tensor.nbytes // rows
