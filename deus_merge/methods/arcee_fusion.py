"""Only the changes that matter most are taken over: large ones, in rows whose distribution shifts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..core.parameters import Parameter
from ._ranks import cuts, keys
from ._runs import PieceMethod, Pieces

if TYPE_CHECKING:
    import torch

_EPSILON = 1e-8
_SPREADS = 1.5  # Tukey's fence: this many interquartile ranges above the median


class ArceeFusion(PieceMethod):
    name = "arcee_fusion"
    summary = "the base model with the other's most important changes: outliers of |change| times divergence of the row"
    reference = "Arcee Fusion, mergekit; quartiles are exact, where mergekit samples tensors above a million elements"
    adds_base = True
    base = "required"
    others = (1, 1)
    parameters: tuple[Parameter, ...] = ()

    def step(self, task):
        return (task.shape or (1,))[-1]

    def make(self, pieces):
        last = pieces.numel - 1
        quartiles = [int(last * q) for q in (0.25, 0.5, 0.75)]
        found = cuts(lambda: (keys(_importance(pieces, run)) for run in pieces.runs()), quartiles)
        low, middle, high = (float(c.value) for c in found)
        threshold = middle + _SPREADS * (high - low)
        (other,) = pieces.others

        def merge(run: slice) -> torch.Tensor:
            taken = _importance(pieces, run) >= threshold  # (m,)
            return pieces.delta(other, run).mul_(taken).add_(pieces.addend(pieces.base, run))  # (m,)

        return pieces.made(merge)


def _importance(pieces: Pieces, run: slice) -> torch.Tensor:
    """``|x - b| KL(softmax x || softmax b)``, (m,), float32, with the divergence of each row in float64.

    In float32 the divergence of a fine-tuned row would be lost in the rounding of its terms.
    """
    width = (pieces.task.shape or (1,))[-1]
    (other,) = pieces.others
    x, b = (pieces.source(i, run).view(-1, width).double() for i in (other, pieces.base))  # (rows, d) each
    p, q = (t.softmax(dim=1).add_(_EPSILON) for t in (x, b))  # (rows, d) each
    divergence = (p * (p / q).log_()).sum(dim=1, keepdim=True).clamp_(min=0)  # (rows, 1)
    return pieces.delta(other, run).abs_().view(-1, width).mul_(divergence).view(-1).float()


METHOD = ArceeFusion()
