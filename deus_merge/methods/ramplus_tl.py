"""RAM that makes up for averaging: the more of a source's changes are shared, the more its own ones count."""

from __future__ import annotations

from ..core.parameters import Parameter
from .ram import EPSILON, Ram, changes


class RamPlus(Ram):
    name = "ramplus_tl"
    summary = "ram, with what one source alone changed scaled up by how much of it is shared, tensor by tensor"
    parameters = (
        Parameter("r", "number", 0.1, "how strongly unshared changes are scaled up"),
        Parameter("alpha", "number", 0.2, "most that the ratio of shared to unshared changes counts", minimum=0),
        EPSILON,
    )

    def unique_factors(self, inputs):
        """``1 + r min(ρ, alpha)``, where ρ is the number of shared changes over that of unshared ones."""
        import torch

        p = inputs.output.parameters
        shared = torch.zeros(len(inputs.others), dtype=torch.int64, device=inputs.stored[0].device)  # (s,)
        unique = torch.zeros_like(shared)  # (s,)
        for run in inputs.runs():
            _, changed, count = changes(inputs, run)  # ..., (s, m), (m,)
            shared = shared + (changed & (count > 1)).sum(dim=1)  # (s,)
            unique = unique + (changed & (count == 1)).sum(dim=1)  # (s,)
        ratios = [a / max(b, p["epsilon"]) if a else 0.0 for a, b in zip(shared.tolist(), unique.tolist(), strict=True)]
        return [1 + p["r"] * min(ratio, p["alpha"]) for ratio in ratios]


METHOD = RamPlus()
