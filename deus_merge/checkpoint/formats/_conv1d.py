"""Weights of transformers' ``Conv1D``: (in, out) in the model, but (out, in) like any other once they are quantised."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ...core.tensors import StoredTensor
from .base import Format, Weight

if TYPE_CHECKING:
    import torch

_MODEL_TYPES = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")  # all linear layers in ``h`` are Conv1D
_IN_LAYER = re.compile(r"(?:.+\.)?h\.\d+\..+")


def as_in_model(weight: Weight, config: Mapping[str, Any]) -> Weight:
    """A weight of a format whose weights are (out, in), as the model with this config has it."""
    if config.get("model_type") not in _MODEL_TYPES or not _IN_LAYER.fullmatch(weight.name) or len(weight.shape) != 2:
        return weight
    quantization = replace(weight.quantization, settings={**weight.quantization.settings, "transposed": True})
    return Weight(weight.name, weight.shape[::-1], quantization)


def is_transposed(weight: StoredTensor) -> bool:
    """Whether the model's weight is the transpose of what its format stores."""
    return weight.quantization is not None and bool(weight.quantization.settings.get("transposed"))


def stored_way(weight: StoredTensor) -> StoredTensor:
    """A transposed weight with the shape that its format knows."""
    return replace(weight, shape=weight.shape[::-1])


def dequantize(
    format_: Format, weight: StoredTensor, parts: Mapping[str, torch.Tensor], start: int, stop: int, rows: int
) -> torch.Tensor:
    """As `Format.dequantize`, for a transposed weight.

    Args:
        format_: Its format.
        weight: The weight as the model has it.
        parts: Its parts.
        start, stop: Rows of the model's weight.
        rows: How many stored rows may be dequantised at once.
    """
    import torch

    stored = stored_way(weight)
    values = torch.empty((stop - start, stored.shape[0]), dtype=torch.float32)
    for at in range(0, stored.shape[0], rows):
        end = min(at + rows, stored.shape[0])
        values[:, at:end] = format_.dequantize(stored, parts, at, end)[:, start:stop].T
    return values
