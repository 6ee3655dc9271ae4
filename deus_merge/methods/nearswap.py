"""Keep the base model where it is far from the other, swap in the other where they are near."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..core.parameters import REQUIRED, Parameter
from ._runs import TensorwiseMethod

if TYPE_CHECKING:
    import torch

_EPSILON = 1e-6  # distances below count as this much


class NearSwap(TensorwiseMethod):
    name = "nearswap"
    summary = "the base model moved towards the other by at most t in each element"
    reference = "alchemonaut, QuartetAnemoi-70B-t0.0001 (model card)"
    adds_base = True
    base = "required"
    others = (1, 1)
    parameters = (Parameter("t", "number", REQUIRED, "elements at most this far apart become the other source's"),)

    def compute(self, inputs):
        """``w b + (1 - w) a`` with a of the base model and ``w = t / |a - b|``, from 0 to 1."""
        (other,) = inputs.others

        def merge(run: slice) -> torch.Tensor:
            distance = inputs.delta(other, run).abs_().clamp_(min=_EPSILON)  # (m,)
            weight = (inputs.output.parameters["t"] / distance).clamp_(0, 1)  # (m,)
            result = inputs.own(other, run).mul_(weight)  # (m,)
            return result.add_((1 - weight).mul_(inputs.source(inputs.base_model, run)))

        return inputs.each_run(merge)


METHOD = NearSwap()
