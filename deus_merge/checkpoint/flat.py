"""Tensors as long vectors, of which only the run at hand is read or computed."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ..core.tensors import StoredTensor
from ..core.units import torch_dtype

if TYPE_CHECKING:
    import torch

    from .tensor_source import TensorSource


class FlatRows:
    """A derived tensor, (n,): only the rows of the run at hand are in memory.

    Attributes:
        dtype: The stored dtype; a run may have a wider one.
        device: The device of the runs: the CPU.
    """

    def __init__(self, source: TensorSource, info: StoredTensor):
        import torch

        self.dtype, self.device = torch_dtype(info.dtype), torch.device("cpu")
        self._source, self._name = source, info.name
        self._width = math.prod(info.shape[1:])

    def __getitem__(self, run: slice) -> torch.Tensor:
        """Elements ``run.start`` to ``run.stop``, (m,)."""
        first, last = run.start // self._width, -(-run.stop // self._width)
        rows = self._source.slice(self._name, first, last).reshape(-1)
        return rows[run.start - first * self._width : run.stop - first * self._width]
