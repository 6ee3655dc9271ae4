"""Task arithmetic and its refinements: sums of sparsified task vectors, with or without a consensus about signs.

With δ_i = x_i - b, s_i the sparsified δ_i and w_i the weights, the result is ``b + λ Σ w_i s_i / D``. With sign
consensus an element's sum runs over those sources only whose w_i s_i has the sign of all of them added up. D is 1, or
with ``normalize`` the sum of the weights that took part.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from ..core.parameters import REQUIRED, Parameter
from ._runs import FlatInputs, TensorwiseMethod, others
from ._sparsify import Begin, restoring_factor
from .base import COMPUTE, copy_of

if TYPE_CHECKING:
    import torch

Kept = Callable[[int, slice], "torch.Tensor"]  # number of a source, run -> its sparsified task vector there, (m,)
_BALANCED = 1e-8  # weights whose sum is at most this large are not divided by it


class TaskVectorMethod(TensorwiseMethod):
    """One member of the family. Subclasses define how they sparsify, and their defaults.

    Attributes:
        consensus: Whether signs are agreed upon.
    """

    adds_base = True
    base = "required"
    others = (0, None)
    consensus = False

    def sparsify(self, inputs: FlatInputs, source: int) -> Begin | None:
        """Which elements of a source's task vector are kept; None for all."""
        return None

    def decide(self, output):
        """Where nothing is added, the base model is copied."""
        weights = [output.source_parameters[i]["weight"] for i in others(output)]
        return copy_of(output.base) if not any(weights) or output.parameters["lambda"] == 0 else COMPUTE

    def compute(self, inputs):
        output = inputs.output
        sources = [i for i in others(output) if output.source_parameters[i]["weight"] != 0]
        weights = [output.source_parameters[i]["weight"] for i in sources]
        begins = [self.sparsify(inputs, i) for i in sources]
        scales = list(weights)
        if output.parameters["rescale"]:
            scales = [w * restoring_factor(inputs, i, b) for w, i, b in zip(weights, sources, begins, strict=True)]
        masks = [begin() if begin else None for begin in begins]

        def kept(j: int, run: slice) -> torch.Tensor:
            delta = inputs.delta(sources[j], run)  # (m,)
            mask = masks[j]
            return delta.mul_(mask(delta)) if mask else delta

        normalize, factor = output.parameters["normalize"], output.parameters["lambda"]
        if self.consensus and len(sources) > 1:
            return inputs.each_run(_agreed(inputs, kept, weights, scales, normalize, factor))
        if normalize and (self.consensus or abs(sum(weights)) >= _BALANCED):
            factor /= sum(weights)
        return inputs.each_run(_added(inputs, kept, [scale * factor for scale in scales]))


def family_parameters(*own: Parameter, normalize: bool, rescale: bool) -> tuple[Parameter, ...]:
    """The parameters of a member of the family.

    Args:
        own: Those that it alone has.
        normalize, rescale: Its defaults.
    """
    return (
        Parameter("weight", "number", REQUIRED, "weight of a source", scope="source"),
        Parameter("density", "number", 1.0, "share of a task vector that is kept", "source", minimum=0, maximum=1),
        *own,
        Parameter("normalize", "boolean", normalize, "divide by the sum of the weights that took part"),
        Parameter(
            "rescale", "boolean", rescale, "scale the kept part of a task vector to the sum of magnitudes of all of it"
        ),
        Parameter("lambda", "number", 1.0, "factor on the merged task vector"),
        Parameter("int8_mask", "boolean", False, "accepted for mergekit's sake: masks take no memory to speak of"),
    )


def _added(inputs: FlatInputs, kept: Kept, scales: Sequence[float]) -> Callable[[slice], torch.Tensor]:
    """``b + Σ c_j s_j`` over a run, (m,)."""

    def merge(run: slice) -> torch.Tensor:
        result = inputs.own(inputs.base_model, run)  # (m,)
        for j, scale in enumerate(scales):
            result.add_(kept(j, run), alpha=scale)
        return result

    return merge


def _agreed(
    inputs: FlatInputs, kept: Kept, weights: Sequence[float], scales: Sequence[float], normalize: bool, factor: float
) -> Callable[[slice], torch.Tensor]:
    """``b + λ Σ c_j s_j / D`` over a run, (m,), of those c_j s_j with the sign of all added up (positive for 0).

    Reference: Yadav et al., TIES-Merging, arXiv 2306.01708, sections 3.2 and 3.3.
    """
    import torch

    def merge(run: slice) -> torch.Tensor:
        vectors = [kept(j, run).mul_(scale) for j, scale in enumerate(scales)]  # (m,) each
        sign = vectors[0] + vectors[1]  # (m,)
        for vector in vectors[2:]:
            sign.add_(vector)
        sign.ge_(0).mul_(2).sub_(1)  # (m,), 1 or -1
        for vector in vectors:
            vector.mul_(sign).clamp_(min=0)  # above 0 where the signs agree
        result = vectors[0].clone() if normalize else vectors[0]  # (m,)
        for vector in vectors[1:]:
            result.add_(vector)
        if normalize:
            divisor = torch.zeros_like(result)  # (m,)
            for vector, weight in zip(vectors, weights, strict=True):
                divisor.add_(vector.gt_(0), alpha=weight)
            result.div_(divisor.add_(torch.eq(divisor, 0, out=torch.empty_like(divisor))))
        return result.mul_(sign.mul_(factor)).add_(inputs.addend(inputs.base_model, run))

    return merge
