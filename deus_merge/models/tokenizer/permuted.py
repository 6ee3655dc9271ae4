"""Checkpoints whose embeddings and head are read in the order of the output's tokens, row by row."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ...checkpoint.tensor_source import FileStamp, TensorSource
from ...core.errors import PlanError
from ...core.tensors import StoredTensor
from ...core.units import ITEMSIZE, promoted, torch_dtype
from .rows import MEAN, PADDING, RowMap

if TYPE_CHECKING:
    import numpy as np
    import torch

_NEAR = 64  # stored rows with a distance of at most this are read together
_CHUNK = 32 << 20  # bytes of a tensor that are averaged at once


@dataclass(frozen=True)
class Permuted:
    """One tensor in another order.

    Attributes:
        info: The tensor as readers see it: with the output's number of rows, in a dtype that holds every source's.
        map: The origin of its rows.
        sources: The checkpoints that rows are taken from, by the map's model indices.
    """

    info: StoredTensor
    map: RowMap
    sources: Mapping[int, TensorSource]


def permute(
    name: str, member: int, members: Sequence[int], rows: RowMap, checkpoints: Sequence[TensorSource]
) -> Permuted | None:
    """A model's tensor in the output's order; None if the stored tensor has that order.

    Args:
        name: The tensor's name.
        member: The tensor's model, as an index into ``checkpoints``.
        members: The models of all sources of its block.
        rows: The origin of its rows.
        checkpoints: The stored checkpoint of every model of the recipe.

    Raises:
        PlanError: a model that rows are taken from has no such tensor, or one of another width.
    """
    own = checkpoints[member].tensors[name]
    givers = {int(i) for i in set(rows.model.tolist()) if i >= 0}
    givers |= {i for i in range(rows.means.shape[1]) if (rows.means[:, i] >= 0).any()}
    for i in sorted(givers):
        given = checkpoints[i].tensors.get(name)
        if given is None or given.shape[1:] != own.shape[1:]:
            raise PlanError(
                f"no rows of {name} can be taken from this model",
                where=checkpoints[i].where,
                expected=f"rows of shape {list(own.shape[1:])}",
                got="no such tensor" if given is None else f"rows of shape {list(given.shape[1:])}",
            )
    dtype = promoted([checkpoints[i].tensors[name].dtype for i in {*members, *givers}])
    if rows.is_identity(member, own.shape[0]) and dtype == own.dtype:
        return None
    shape = (rows.rows, *own.shape[1:])
    nbytes = math.prod(shape) * ITEMSIZE[dtype]
    info = replace(own, dtype=dtype, shape=shape, nbytes=nbytes, derived=True, quantization=None)
    return Permuted(info, rows, {i: checkpoints[i] for i in givers})


class PermutedCheckpoint:
    """A checkpoint (`checkpoint.reader.TensorSource`) with some tensors read in the order of the output's tokens."""

    def __init__(self, stored: TensorSource, permuted: Mapping[str, Permuted]):
        self.where, self.folders, self.files = stored.where, stored.folders, stored.files
        self.side_files, self.provenance, self.config = stored.side_files, stored.provenance, stored.config
        self.fingerprint = stored.fingerprint
        self.tensors: Mapping[str, StoredTensor] = {
            name: permuted[name].info if name in permuted else info for name, info in stored.tensors.items()
        }
        self._stored, self._permuted = stored, permuted
        self._padding: dict[str, torch.Tensor] = {}

    def read(self, name: str) -> torch.Tensor:
        if name not in self._permuted:
            return self._stored.read(name)
        return self.slice(name, 0, self._permuted[name].map.rows)

    def slice(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows ``start`` to ``stop``. If some of them are means, all are widened to float32, so that a mean is rounded
        only once, when it is written."""
        import numpy as np
        import torch

        if name not in self._permuted:
            return self._stored.slice(name, start, stop)
        tensor = self._permuted[name]
        model, row = tensor.map.model[start:stop], tensor.map.row[start:stop]  # (m,) each
        dtype = torch_dtype(tensor.info.dtype)
        if (model == MEAN).any() or (model == PADDING).any():
            dtype = torch.promote_types(dtype, torch.float32)
        out = torch.zeros((len(model), *tensor.info.shape[1:]), dtype=dtype)  # (m, d)
        for i in np.unique(model[model >= 0]).tolist():
            taken = np.flatnonzero(model == i)
            _gather(tensor.sources[i], name, row[taken], out, taken)
        averaged = np.flatnonzero(model == MEAN)
        if len(averaged):
            out[torch.from_numpy(averaged)] = _means(tensor, tensor.map.means[row[averaged]]).to(dtype)
        if (model == PADDING).any():
            out[torch.from_numpy(model == PADDING)] = self._mean_row(name).to(dtype)
        return out

    def prefetch(self, names: Iterable[str]) -> None:
        names = list(names)
        self._stored.prefetch(n for n in names if n not in self._permuted)
        for name in names:
            if name in self._permuted:
                for source in self._permuted[name].sources.values():
                    source.prefetch([name])

    def stamp(self) -> list[FileStamp]:
        return self._stored.stamp()

    def root(self, name: str) -> tuple[TensorSource, str]:
        return self._stored.root(name)

    def givers(self, name: str) -> tuple[TensorSource, ...]:
        """The sources that a tensor's rows are taken from."""
        return tuple(self._permuted[name].sources.values()) if name in self._permuted else (self._stored,)

    def bound(self, results: Mapping[str, TensorSource]) -> PermutedCheckpoint:
        permuted = {
            name: replace(tensor, sources={i: s.bound(results) for i, s in tensor.sources.items()})
            for name, tensor in self._permuted.items()
        }
        return PermutedCheckpoint(self._stored.bound(results), permuted)

    def workspace(self, name: str, minimum: bool = False) -> int:
        """The workspace of the sources; the rows themselves are read when they are needed."""
        return sum(source.workspace(name, minimum) for source in self.givers(name))

    def _mean_row(self, name: str) -> torch.Tensor:
        """The mean of all rows that have a token, (d,), float64; computed once."""
        import numpy as np
        import torch

        if name not in self._padding:
            tensor = self._permuted[name]
            tokens = np.flatnonzero(tensor.map.model != PADDING)
            step = max(1, _CHUNK // max(1, tensor.info.nbytes // max(1, tensor.map.rows)))
            total = torch.zeros(tensor.info.shape[1:], dtype=torch.float64)  # (d,)
            for run in _runs(tokens, step):
                total += self.slice(name, int(run[0]), int(run[-1]) + 1).sum(dim=0, dtype=torch.float64)
            self._padding[name] = total / max(1, len(tokens))
        return self._padding[name]


def roots(source: TensorSource, name: str) -> list[tuple[TensorSource, str]]:
    """`TensorSource.root` of every source that a tensor's rows are taken from."""
    givers = source.givers(name) if isinstance(source, PermutedCheckpoint) else (source,)
    return [giver.root(name) for giver in givers]


def _gather(source: TensorSource, name: str, rows: np.ndarray, out: torch.Tensor, places: np.ndarray) -> None:
    """Copy stored rows (m,) to rows ``places`` (m,) of ``out``. Rows near each other are read together."""
    import numpy as np
    import torch

    order = np.argsort(rows, kind="stable")
    rows, places = rows[order], places[order]
    for near in np.split(np.arange(len(rows)), np.flatnonzero(np.diff(rows) > _NEAR) + 1):
        first, last = int(rows[near[0]]), int(rows[near[-1]])
        stored = source.slice(name, first, last + 1).to(out.dtype)  # (n, d)
        out[torch.from_numpy(places[near])] = stored[torch.from_numpy(rows[near] - first)]


def _means(tensor: Permuted, rows: np.ndarray) -> torch.Tensor:
    """The means (m, d), float64, over rows (m, models) of several models."""
    import numpy as np
    import torch

    total = torch.zeros((len(rows), *tensor.info.shape[1:]), dtype=torch.float64)  # (m, d)
    for i in np.flatnonzero((rows >= 0).any(axis=0)).tolist():
        here = np.flatnonzero(rows[:, i] >= 0)
        part = torch.empty((len(here), *tensor.info.shape[1:]), dtype=torch.float64)  # (n, d)
        _gather(tensor.sources[i], tensor.info.name, rows[here, i], part, np.arange(len(here)))
        total[torch.from_numpy(here)] += part
    counts = torch.from_numpy((rows >= 0).sum(axis=1))  # (m,)
    return total / counts.view(-1, *[1] * (total.ndim - 1))


def _runs(values: np.ndarray, longest: int) -> list[np.ndarray]:
    """Ascending numbers (n,), split at gaps and into runs of at most ``longest``."""
    import numpy as np

    parts = np.split(values, np.flatnonzero(np.diff(values) > 1) + 1)
    return [part[i : i + longest] for part in parts for i in range(0, len(part), longest)]
