"""Between the base model and the mean of its fine-tunes, as near to the latter as these agree."""

from __future__ import annotations

from itertools import combinations
from typing import TYPE_CHECKING

from ..core.parameters import Parameter
from ._runs import TensorwiseMethod
from ._spans import combined, gram

if TYPE_CHECKING:
    import torch

_SMALL = 1e-6  # of a product of norms, and of the denominator of the ratio


class ModelStock(TensorwiseMethod):
    name = "model_stock"
    summary = "from the base model towards the mean of the others, the farther the more these agree"
    reference = "Jang, Yun, Han, Model Stock: all we need is just a few fine-tuned models, arXiv 2403.19522"
    adds_base = True
    base = "required"
    others = (2, None)
    parameters = (Parameter("filter_wise", "boolean", False, "one ratio per row instead of one per tensor"),)

    def step(self, output):
        return (output.shape or (1,))[-1]

    def compute(self, inputs):
        if inputs.output.parameters["filter_wise"]:
            return inputs.each_run(lambda run: _by_row(inputs, run))
        sources = inputs.others
        products = gram(inputs, sources, relative=True)  # (s, s)
        norms = products.diagonal().sqrt()  # (s,)
        pairs = [(products[i, j], norms[i] * norms[j]) for i, j in combinations(range(len(sources)), 2)]
        share = float(ratio(pairs, len(sources))) / len(sources)
        return combined(inputs, sources, [share] * len(sources), relative=True)


def ratio(pairs: list[tuple[torch.Tensor, torch.Tensor]], count: int) -> torch.Tensor:
    """How far to go from the base model to the mean of the others, equation 2 of the paper for N models.

    Args:
        pairs: ⟨δ_i, δ_j⟩ and |δ_i| |δ_j| of every pair, float64, of any shape (...).
        count: N, the number of models.

    Returns:
        ``t = N c / (1 + (N - 1) c)`` with c the mean cosine, (...); 0 where the denominator vanishes.
    """
    import torch

    cosines = [(dot / norms.clamp(min=_SMALL)).clamp(-1, 1) for dot, norms in pairs]
    cosine = torch.stack(cosines).mean(dim=0)
    denominator = 1 + (count - 1) * cosine
    return torch.where(denominator.abs() < _SMALL, 0, count * cosine / denominator)


def _by_row(inputs, run: slice) -> torch.Tensor:
    width = (inputs.output.shape or (1,))[-1]
    deltas = [inputs.delta(i, run).view(-1, width) for i in inputs.others]  # (rows, d) each
    double = [d.double() for d in deltas]  # (rows, d) each
    norms = [d.norm(dim=1) for d in double]  # (rows,) each
    pairs = [((double[i] * double[j]).sum(dim=1), norms[i] * norms[j]) for i, j in combinations(range(len(double)), 2)]
    share = (ratio(pairs, len(deltas)) / len(deltas)).to(inputs.dtype)  # (rows,)
    result = sum(deltas[1:], deltas[0]).mul_(share[:, None])  # (rows, d)
    return result.view(-1).add_(inputs.addend(inputs.base, run))  # (m,)


METHOD = ModelStock()
