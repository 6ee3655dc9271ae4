"""Every format of quantised weights, by name: a file of this folder each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

from ...core.plugins import plugins
from ...core.tensors import Quantization
from .base import Format


def is_zeros(quantization: Quantization, part: str | None) -> bool:
    """Whether a part of a weight that is zero has only zero bytes."""
    return part == next(iter(quantization.parts)) and formats()[quantization.format].zero_codes(quantization)


def formats() -> Mapping[str, Format]:
    """Every format, by name."""
    return cast(Mapping[str, Format], plugins("deus_merge.checkpoint.formats", "FORMAT"))
