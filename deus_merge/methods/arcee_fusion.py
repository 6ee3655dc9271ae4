"""Only the changes that matter most are taken over: large ones, in rows whose distribution shifts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..core.parameters import Parameter
from ._ranks import cuts, keys
from ._runs import FlatInputs, TensorwiseMethod

if TYPE_CHECKING:
    import torch

_EPSILON = 1e-8
_SPREADS = 1.5  # Tukey's fence: this many interquartile ranges above the median


class ArceeFusion(TensorwiseMethod):
    name = "arcee_fusion"
    summary = "the base model with the other's most important changes: outliers of |change| times divergence of the row"
    reference = "Arcee Fusion, mergekit; quartiles are exact, where mergekit samples tensors above a million elements"
    adds_base = True
    base = "required"
    others = (1, 1)
    parameters: tuple[Parameter, ...] = ()

    def step(self, output):
        return (output.shape or (1,))[-1]

    def compute(self, inputs):
        last = inputs.numel - 1
        quartiles = [int(last * q) for q in (0.25, 0.5, 0.75)]
        found = cuts(lambda: (keys(_importance(inputs, run)) for run in inputs.runs()), quartiles)
        low, middle, high = (float(c.value) for c in found)
        threshold = middle + _SPREADS * (high - low)
        (other,) = inputs.others

        def merge(run: slice) -> torch.Tensor:
            taken = _importance(inputs, run) >= threshold  # (m,)
            return inputs.delta(other, run).mul_(taken).add_(inputs.addend(inputs.base_model, run))  # (m,)

        return inputs.each_run(merge)


def _importance(inputs: FlatInputs, run: slice) -> torch.Tensor:
    """``|x - b| KL(softmax x || softmax b)``, (m,), float32, with the divergence of each row in float64.

    In float32 the divergence of a fine-tuned row would be lost in the rounding of its terms.
    """
    width = (inputs.output.shape or (1,))[-1]
    (other,) = inputs.others
    x, b = (inputs.source(i, run).view(-1, width).double() for i in (other, inputs.base_model))  # (rows, d) each
    p, q = (t.softmax(dim=1).add_(_EPSILON) for t in (x, b))  # (rows, d) each
    divergence = (p * (p / q).log_()).sum(dim=1, keepdim=True).clamp_(min=0)  # (rows, 1)
    return inputs.delta(other, run).abs_().view(-1, width).mul_(divergence).view(-1).float()


METHOD = ArceeFusion()
