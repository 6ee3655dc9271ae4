"""Bringing a layer A into the order of a layer B before the two are fused; imports no torch by itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from ..core.tensors import OutputChunk
from ..models.family import TensorSpec
from .options import AlignOptions

if TYPE_CHECKING:
    from torch import Tensor


def fuse_layer(
    a: Mapping[str, Tensor], b: Mapping[str, Tensor], specs: Sequence[TensorSpec], options: AlignOptions
) -> Iterator[OutputChunk]:
    """Align layer A to layer B and fuse them.

    Args:
        a, b: role -> tensor in its stored dtype. Each is looked up at most once, and late, so a lazy mapping may read
            here.
        specs: The roles that are present, in forward order.
        options: See there.

    Yields:
        The chunks of each role, a slot for every t, in the order of ``specs``.

    Raises:
        SolverError: naming the role: shapes that do not fit, weights that are not finite, nothing that matches, or
            what a solver refuses.
    """
    from . import symmetry, transport_flow

    chosen = symmetry if options.alignment == "symmetry" else transport_flow
    return chosen.fuse(a, b, specs, options)


def align_layer(
    a: Mapping[str, Tensor], b: Mapping[str, Tensor], specs: Sequence[TensorSpec], options: AlignOptions
) -> Iterator[OutputChunk]:
    """Layer A in the order of layer B and nothing fused: `fuse_layer` at t = 0, in full, with no zeros."""
    alone = replace(options, t=0.0, zero=frozenset(), match="full", restore_norm="none", output_scale=1.0)
    return fuse_layer(a, b, specs, alone)
