"""Tensors as long vectors, of which only the run at hand is read or computed."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from ..core.tensors import StoredTensor
from ..core.units import torch_dtype

if TYPE_CHECKING:
    import torch


class FlatRows:
    """A derived tensor, (n,): only the rows of the run at hand are in memory.

    Args:
        rows: Gives some rows of the tensor, as `TensorSource.slice` does.
        info: The tensor.

    Attributes:
        dtype: The stored dtype; a run may have a wider one.
        device: The device of the runs: the CPU.
    """

    def __init__(self, rows: Callable[[int, int], torch.Tensor], info: StoredTensor):
        import torch

        self.dtype, self.device = torch_dtype(info.dtype), torch.device("cpu")
        self._rows, self._width = rows, math.prod(info.shape[1:])
        self._first, self._last, self._values = 0, 0, torch.empty(0)  # the rows that were read last: (n,)

    def __getitem__(self, run: slice) -> torch.Tensor:
        """Elements ``run.start`` to ``run.stop``, (m,); only to be read."""
        first, last = run.start // self._width, -(-run.stop // self._width)
        if not self._first <= first <= last <= self._last:  # rows may be longer than runs: whole experts
            self._values = self._rows(first, last).reshape(-1)
            self._first, self._last = first, last
        begin = self._first * self._width
        return self._values[run.start - begin : run.stop - begin]
