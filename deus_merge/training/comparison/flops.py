"""The floating-point operations of a step, also of attention, which torch counts in part or refuses to count."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.utils.flop_counter import FlopCounterMode

_KERNELS = ("flash_attention", "flash_attention_for_cpu", "efficient_attention", "cudnn_attention")


def flop_counter() -> FlopCounterMode:
    """A context manager that counts what is computed in it (``get_total_flops``).

    The formulas are ours: torch 2.11 stops at grouped queries, and 2.13 does not count the kernel of the CPU.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    formulas: dict[Any, Callable[..., int]] = {}
    for kernel in _KERNELS:
        for suffix, formula in (("", _attention), ("_backward", _attention_backward)):
            if (operator := getattr(torch.ops.aten, f"_scaled_dot_product_{kernel}{suffix}", None)) is not None:
                formulas[operator] = formula
    return FlopCounterMode(display=False, custom_mapping=formulas)


def _attention(query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: Any, **__: Any) -> int:
    """Scores and their product with the values, of shapes (b, h, t, e)."""
    batch, heads, length, size = query
    return 2 * batch * heads * length * key[2] * (size + value[3])


def _attention_backward(
    gradient: Sequence[int], query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: Any, **__: Any
) -> int:
    """Scores once more, and the gradients of scores, values, queries and keys."""
    batch, heads, length, size = query
    return 2 * batch * heads * length * key[2] * (3 * size + 2 * value[3])
