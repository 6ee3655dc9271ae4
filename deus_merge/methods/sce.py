"""Select the elements on which sources differ most, calculate weights from what is left, erase minority signs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from ..core.parameters import Parameter
from ._ranks import cuts, keys
from ._runs import FlatInputs, TensorwiseMethod, total

if TYPE_CHECKING:
    import torch

_SMALL = 1e-6  # sums of weights


class Sce(TensorwiseMethod):
    name = "sce"
    summary = "task vectors where they vary most, weighted by their mean square, merged where their signs agree"
    reference = "Wan et al., FuseChat, arXiv 2408.07990, section 3.3"
    adds_base = True
    base = "required"
    others = (0, None)
    parameters = (
        Parameter("select_topk", "number", 1.0, "share of the elements that vary which is kept", minimum=0, maximum=1),
        Parameter("int8_mask", "boolean", False, "accepted for mergekit's sake: masks take no memory to speak of"),
    )

    def compute(self, inputs):
        import torch

        if not inputs.others:
            return inputs.each_run(lambda run: inputs.own(inputs.base_model, run))
        chosen = _Chosen(inputs)
        totals = torch.zeros(len(inputs.others), dtype=torch.float64, device=inputs.stored[0].device)  # (s,)
        for deltas in chosen.runs():
            totals += _row_totals(deltas.square_())
        squares = totals / inputs.numel  # (s,), float64
        even = squares.new_full((len(squares),), 1 / len(squares))  # (s,)
        weights = (squares / squares.sum() if squares.sum() >= _SMALL else even).tolist()
        runs = chosen.runs()

        def merge(run: slice) -> torch.Tensor:
            deltas = next(runs)  # (s, m)
            sign = (deltas.sum(dim=0) >= 0).to(deltas.dtype).mul_(2).sub_(1)  # (m,), 1 or -1
            agreed = deltas.mul_(sign).clamp_(min=0)  # (s, m), above 0 where the signs agree
            result, divisor = agreed.new_zeros(len(sign)), agreed.new_zeros(len(sign))  # (m,)
            for delta, weight in zip(agreed, weights, strict=True):
                result.add_(delta, alpha=weight)
                divisor.add_(delta > 0, alpha=weight)
            result.div_(divisor.clamp_(min=_SMALL)).mul_(sign)
            return result.add_(inputs.addend(inputs.base_model, run))

        return inputs.each_run(merge)


class _Chosen:
    """The selected elements of the task vectors."""

    def __init__(self, inputs: FlatInputs):
        self.inputs = inputs
        self.cut = None
        share = inputs.output.parameters["select_topk"]
        self.everything = share >= 1
        if not self.everything:
            varying = sum(int(_variances(inputs.deltas(run)).count_nonzero()) for run in inputs.runs())
            if count := int(varying * share):
                (self.cut,) = cuts(self._keys, [count])

    def _keys(self) -> Iterator[torch.Tensor]:
        for run in self.inputs.runs():
            yield keys(_variances(self.inputs.deltas(run)), descending=True)

    def runs(self) -> Iterator[torch.Tensor]:
        """Task vectors, (s, m), zero where not selected, run by run."""
        below = self.cut.begin() if self.cut else None
        for run in self.inputs.runs():
            deltas = self.inputs.deltas(run)  # (s, m)
            if below:
                deltas.mul_(below(keys(_variances(deltas), descending=True)))
            yield deltas if self.everything or below else deltas.zero_()


def _variances(deltas: torch.Tensor) -> torch.Tensor:
    """Variance of each element over the sources, (s, m) -> (m,)."""
    return deltas.var(dim=0, unbiased=False)


def _row_totals(values: torch.Tensor) -> torch.Tensor:
    """Sums of rows, (s, m) -> (s,), float64."""
    import torch

    return torch.stack([total(row) for row in values])


METHOD = Sce()
