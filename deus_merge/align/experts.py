"""Which expert of layer A is which of layer B. Both alignments then see A's experts in B's order.

The order of experts means nothing to a layer's function as long as the rows of its router go along (within the groups
of experts that some routers choose first). Experts are compared by what they compute, which does not depend on the
order of their neurons: by their outputs for the same random inputs, and by the rows of the router.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..core.errors import SolverError
from ..core.tensors import Diagnostics, OutputChunk
from ..core.units import is_finite
from ..models.spec import TensorSpec
from .fusion import read
from .heads import best_order
from .options import AlignOptions

if TYPE_CHECKING:
    from torch import Tensor

_PROBES = 32  # inputs that experts are compared on
_EXPERT = re.compile(r"experts\.(\d+)\.(gate|up|down)")


@dataclass(frozen=True, kw_only=True)
class ExpertDiagnostics(Diagnostics):
    """Which of A's experts replace which of B's.

    Attributes:
        experts: A's expert in place of each of B's.
        cosine: Mean cosine of the outputs of matched experts.
        cosine_before: That of experts that have the same number.
    """

    experts: tuple[int, ...]
    cosine: float
    cosine_before: float


@dataclass(frozen=True)
class MatchedExperts:
    """A's experts for B's.

    Attributes:
        order: A's expert in place of each of B's.
        routing: Roles with one entry for each expert.
        chunk: The diagnostics.
    """

    order: tuple[int, ...]
    routing: frozenset[str]
    chunk: OutputChunk

    def reordered(self, layer: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """A with its experts in B's order."""
        return _Reordered(layer, self)


def match(
    a: Mapping[str, Tensor], b: Mapping[str, Tensor], specs: Sequence[TensorSpec], options: AlignOptions
) -> MatchedExperts | None:
    """Match the experts of two layers.

    Args:
        a, b: The layers by role.
        specs: Their matrices and vectors.
        options: ``alignment``, ``symmetry`` and ``heads`` are used.

    Returns:
        None where there are no experts, or they are to stay as they are.

    Raises:
        SolverError: NaN or infinity among the weights.
    """
    router = next((s for s in specs if s.out_space == "experts" and s.in_space), None)
    without = options.heads.without if options.heads else frozenset()
    wanted = options.alignment == "transport_flow" or (
        options.alignment == "symmetry" and "experts" in options.symmetry
    )
    if router is None or not wanted or "experts" in without:
        return None
    rows = [_unit(read(side, router.role, options)) for side in (a, b)]  # (E, d) each
    sketches = [_unit(_outputs(side, specs, options)) for side in (a, b)]  # (E, k·d) each
    similar = sketches[0] @ sketches[1].t()  # (E, E)
    scores = (similar + rows[0] @ rows[1].t()).double().cpu()
    if not is_finite(scores):
        raise SolverError("the weights are not finite", where=router.role, hint="correct the checkpoint")
    groups = options.heads.expert_groups if options.heads else 1
    order = best_order(scores, groups if len(scores) % groups == 0 else 1)
    similar = similar.cpu()
    cosine, before = similar[list(order), range(len(order))].mean().item(), similar.diagonal().mean().item()
    routing = frozenset(s.role for s in specs if s.out_space == "experts")
    found = ExpertDiagnostics(role=router.role, experts=order, cosine=cosine, cosine_before=before)
    return MatchedExperts(order, routing, OutputChunk(router.role, None, diagnostics=found))


def _outputs(layer: Mapping[str, Tensor], specs: Sequence[TensorSpec], options: AlignOptions) -> Tensor:
    """What each expert gives for random inputs: (E, k·d). The activation is SiLU; only similarity matters here."""
    import torch

    roles: dict[int, dict[str, str]] = {}
    for spec in specs:
        if found := _EXPERT.fullmatch(spec.role):
            roles.setdefault(int(found[1]), {})[found[2]] = spec.role
    outputs, probes = [], None
    for _, expert in sorted(roles.items()):
        up = read(layer, expert["up"], options)
        if probes is None:
            probes = torch.randn(_PROBES, up.shape[1], generator=torch.Generator().manual_seed(0)).to(up)  # (k, d)
        hidden = probes @ up.t()  # (k, f)
        if "gate" in expert:
            hidden = hidden * torch.nn.functional.silu(probes @ read(layer, expert["gate"], options).t())
        else:
            hidden = torch.nn.functional.silu(hidden)
        outputs.append((hidden @ read(layer, expert["down"], options).t()).flatten())
    return torch.stack(outputs)


def _unit(rows: Tensor) -> Tensor:
    norms = rows.norm(dim=1, keepdim=True)
    return rows / norms.where(norms > 0, 1)


class _Reordered(Mapping[str, "Tensor"]):
    """A layer whose experts are in another order."""

    def __init__(self, layer: Mapping[str, Tensor], matched: MatchedExperts):
        self._layer, self._matched = layer, matched

    def __getitem__(self, role: str) -> Tensor:
        import torch

        if role in self._matched.routing:
            values = self._layer[role]
            return values.index_select(0, torch.tensor(self._matched.order, device=values.device))
        if found := re.match(r"experts\.(\d+)\.", role):
            role = f"experts.{self._matched.order[int(found[1])]}.{role[found.end() :]}"
        return self._layer[role]

    def __iter__(self) -> Iterator[str]:
        return iter(self._layer)

    def __len__(self) -> int:
        return len(self._layer)
