"""Small unsigned numbers that are packed in int32 words, as AutoAWQ and AutoGPTQ store them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def unpack(words: torch.Tensor, bits: int, places: Sequence[int] | None = None) -> torch.Tensor:
    """The numbers in words, in float32.

    Args:
        words: (r, w) int32; not written to.
        bits: Bits of a number: 2, 4 or 8.
        places: Where in a word its first, second, ... number is, counted from the lowest bits; None for the order of
            the numbers.

    Returns:
        (r, w * 32 / bits), in new memory.
    """
    import torch

    count = 32 // bits
    numbers = torch.empty((*words.shape, count), dtype=torch.float32)  # (r, w, n)
    for i, place in enumerate(places or range(count)):
        numbers[..., i] = (words >> bits * place) & ((1 << bits) - 1)  # (r, w); the mask removes the sign's bits
    return numbers.flatten(1)
