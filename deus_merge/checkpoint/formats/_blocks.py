"""Values that share a scale with their neighbours in a row. No format: helpers of formats."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def in_blocks(
    apply: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    values: torch.Tensor,
    shared: torch.Tensor,
    width: int,
) -> None:
    """Change values in place by a number that the values of a block share: ``torch.Tensor.mul_`` with scales, say.

    Args:
        apply: What changes values.
        values: (.., r, c), contiguous.
        shared: (.., r, ceil(c / width)).
        width: How many columns share a number; the last block of a row may have fewer.
    """
    whole = values.shape[-1] // width  # blocks
    if whole:
        apply(values[..., : whole * width].unflatten(-1, (whole, width)), shared[..., :whole, None])
    if values.shape[-1] % width:
        apply(values[..., whole * width :], shared[..., whole:])
