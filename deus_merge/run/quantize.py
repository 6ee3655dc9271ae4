"""Writes computed weights in the format of a quantised base."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ..checkpoint.formats._conv1d import is_transposed, stored_way
from ..checkpoint.formats.registry import formats
from ..checkpoint.shards import ShardWriter
from ..core.tensors import Action, OutputChunk
from ..methods.base import OutputTensor

if TYPE_CHECKING:
    import torch


class QuantizedWriter:
    """Collects the values of each quantised output, and writes its parts once all are there.

    Args:
        writer: The writer of the files.
    """

    def __init__(self, writer: ShardWriter):
        self._writer = writer
        self._runs: dict[str, list[torch.Tensor]] = {}  # runs of an output's values so far, in their order

    def add(self, output: OutputTensor, chunk: OutputChunk) -> None:
        """Take values of an output, in float32.

        Raises:
            MachineError: no space left, or the disk fails.
        """
        import torch

        assert chunk.values is not None
        runs = self._runs.setdefault(output.name, [])
        runs.append(chunk.values.detach().to("cpu").reshape(-1))
        if sum(map(len, runs)) == math.prod(output.shape):
            del self._runs[output.name]
            self._write(output, torch.cat(runs) if len(runs) > 1 else runs[0])

    def zeros(self, output: OutputTensor) -> None:
        """Write an output of zeros.

        Raises:
            MachineError: no space left, or the disk fails.
        """
        import torch

        assert output.action is Action.ZEROS
        self._write(output, torch.zeros(math.prod(output.shape)))

    def _write(self, output: OutputTensor, values: torch.Tensor) -> None:
        quantization = output.quantization
        assert quantization is not None
        like = next(stored for stored in output.inputs if stored.quantization == quantization)
        values = values.view(output.shape)
        if is_transposed(like):
            values, like = values.T.contiguous(), stored_way(like)
        parts = formats()[quantization.format].quantize(values, like)
        for label, name in quantization.named(output.name).items():
            self._writer.write_tensor(name, parts[label])
