"""Layers as they are, or scaled."""

from __future__ import annotations

from ..core.parameters import Parameter
from ._runs import PieceMethod
from .base import Compute, CopyOf, Zeros


class Passthrough(PieceMethod):
    name = "passthrough"
    summary = "one source, copied as it is; `scale` multiplies its tensors"
    reference = "mergekit"
    parameters = (Parameter("scale", "number", 1.0, "factor on the tensor; 0 writes zeros", scope="source"),)

    def check(self, tasks, sources):
        return None if sources == 1 else f"passthrough takes exactly one source, not {sources}"

    def origin(self, task):
        scale = task.source_parameters[0]["scale"]
        return CopyOf(0) if scale == 1 else Zeros() if scale == 0 else Compute()

    def make(self, pieces):
        scale = pieces.task.source_parameters[0]["scale"]
        return pieces.made(lambda run: pieces.own(0, run).mul_(scale))


METHOD = Passthrough()
