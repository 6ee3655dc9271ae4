"""Alignment of a layer A to the order of a layer B, and fusion of the two. Importing it does not import torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from ..core.tensors import OutputChunk
from ..models.spec import TensorSpec
from .options import AlignOptions
from .packing import Packing

if TYPE_CHECKING:
    from torch import Tensor

Shapes = Mapping[str, tuple[int, ...]]


def fuse_layer(
    a: Mapping[str, Tensor],
    b: Mapping[str, Tensor],
    specs: Sequence[TensorSpec],
    options: AlignOptions,
    shapes: Shapes | None = None,
) -> Iterator[OutputChunk]:
    """Align layer A to layer B and fuse them.

    Args:
        a, b: role -> tensor in its stored dtype. Each is looked up late, so that a lazy mapping may read the tensor at
            that moment; and once, but for the tensors of experts, which are also looked up to find out which is which.
        specs: The roles that are present, in forward order.
        options: How to align and to fuse.
        shapes: The shapes of tensors that consist of several matrices, by role.

    Yields:
        The chunks of each role, a slot for every t, in the order of ``specs``.

    Raises:
        SolverError: naming the role: shapes that do not fit, weights that are not finite, no match good enough, or a
            problem that the solver refuses.
    """
    from . import experts, symmetry, transport_flow

    chosen = symmetry if options.alignment == "symmetry" else transport_flow
    packing = Packing(specs, shapes or {}, options.heads)
    whole = options.whole or any(spec.layout for spec in packing.stored.values())
    inner = replace(options, zero=packing.roles(options.zero), whole=whole)
    sides = packing.unpack(a), packing.unpack(b)
    matched = experts.match(*sides, packing.specs, inner)
    if matched is not None:
        yield matched.chunk
        sides = matched.reordered(sides[0]), sides[1]
    yield from packing.pack(chosen.fuse(*sides, packing.specs, inner))


def align_layer(
    a: Mapping[str, Tensor],
    b: Mapping[str, Tensor],
    specs: Sequence[TensorSpec],
    options: AlignOptions,
    shapes: Shapes | None = None,
) -> Iterator[OutputChunk]:
    """Layer A in the order of layer B, without fusion: `fuse_layer` at t = 0, in full, with no zeros.

    Where a plan with relaxed marginals leaves rows of B unmatched, the result has B's own rows.
    """
    alone = replace(options, t=0.0, zero=frozenset(), match="full", restore_norm="none", output_scale=1.0)
    return fuse_layer(a, b, specs, alone, shapes)
