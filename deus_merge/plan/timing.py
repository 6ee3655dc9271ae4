"""Rough estimates of how long a block takes on a CPU, for the table of a plan and to share out its pieces."""

from __future__ import annotations

import math

from ..core.tensors import Action
from ..methods.registry import methods
from .blocks import BlockPlan

_COPY_RATE, _MERGE_RATE, _LEARN_RATE = 1e9, 3e8, 7.5e6  # bytes a second
_ALIGN_SECONDS, _PRODUCT_RATE = 4.5e-8, 7e11  # seconds an element and FLOP a second, measured on two cores at 8B


def block_seconds(block: BlockPlan) -> float:
    """The time in seconds that a block takes."""
    method = methods()[block.method]
    aligned = method.inserts and not method.learns and block.merges
    seconds = block.nbytes / _COPY_RATE
    for output in block.outputs:
        if aligned:  # also weights that become zero: neurons are compared by them
            rows = max(output.shape) if len(output.shape) > 1 else 0
            seconds += math.prod(output.shape) * (_ALIGN_SECONDS + 2 * rows / _PRODUCT_RATE)
        elif output.action not in (Action.COPY, Action.ZEROS):
            learned = output.computed and method.learns
            seconds += output.nbytes_read / (_LEARN_RATE if learned else _MERGE_RATE)
    return seconds
