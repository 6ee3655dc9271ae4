"""Layers as they are, or scaled."""

from __future__ import annotations

from ..core.parameters import Parameter
from ._runs import TensorwiseMethod
from .base import COMPUTE, ZEROS, Refusal, copy_of


class Passthrough(TensorwiseMethod):
    name = "passthrough"
    summary = "one source, copied as it is; `scale` multiplies its tensors"
    reference = "mergekit"
    parameters = (Parameter("scale", "number", 1.0, "factor on the tensor; 0 writes zeros", scope="source"),)

    def check(self, outputs, sources):
        return None if sources == 1 else Refusal(f"passthrough takes exactly one source, not {sources}")

    def decide(self, output):
        scale = output.source_parameters[0]["scale"]
        return copy_of(0) if scale == 1 else ZEROS if scale == 0 else COMPUTE

    def compute(self, inputs):
        scale = inputs.output.source_parameters[0]["scale"]
        return inputs.each_run(lambda run: inputs.own(0, run).mul_(scale))


METHOD = Passthrough()
