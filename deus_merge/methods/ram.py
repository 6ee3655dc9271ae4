"""Every change that only one source made is kept whole; changes that several made are averaged."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..core.parameters import Parameter
from ._runs import FlatInputs, TensorwiseMethod

if TYPE_CHECKING:
    import torch

EPSILON = Parameter("epsilon", "number", 1e-5, "a change at most this large counts as none", minimum=0)


class Ram(TensorwiseMethod):
    name = "ram"
    summary = "task vectors: what one source changed is kept, what several changed is averaged over these"
    reference = "Reinforced Agent Merging, arXiv 2601.13572"
    adds_base = True
    base = "required"
    others = (0, None)
    parameters = (EPSILON,)

    def compute(self, inputs):
        factors = self.unique_factors(inputs)

        def merge(run: slice) -> torch.Tensor:
            deltas, changed, count = changes(inputs, run)  # (s, m), (s, m), (m,)
            result = inputs.own(inputs.base_model, run)  # (m,)
            share = 1 / count.clamp(min=1).to(inputs.dtype)  # (m,)
            for delta, change, factor in zip(deltas, changed, factors, strict=True):
                result.add_(delta.mul_(change).mul_(share if factor == 1 else share + (count == 1) * (factor - 1)))
            return result

        return inputs.each_run(merge)

    def unique_factors(self, inputs: FlatInputs) -> Sequence[float]:
        """The factor on each source's own changes."""
        return [1.0] * len(inputs.others)


def changes(inputs: FlatInputs, run: slice) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The task vectors of a run, (s, m), where they change anything, (s, m) bool, and how many do, (m,)."""
    deltas = inputs.deltas(run)  # (s, m)
    changed = deltas.abs() > inputs.output.parameters["epsilon"]  # (s, m)
    return deltas, changed, changed.sum(dim=0)


METHOD = Ram()
