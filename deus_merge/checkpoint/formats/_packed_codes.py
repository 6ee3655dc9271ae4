"""Codes of fewer than eight bits, several to a stored number. No format: helpers of formats."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def unpack_columns(words: torch.Tensor, bits: int, columns: int) -> torch.Tensor:
    """Signed codes that are packed along their rows.

    Args:
        words: int32, (rows, ceil(columns * bits / 32)): the first code in the lowest bits, each code plus
            ``2 ** (bits - 1)``.
        bits: 1, 2, 4 or 8.
        columns: How many codes a row has.

    Returns:
        float32, (rows, columns).
    """
    import torch

    octets = words.reshape(-1).view(torch.uint8).view(words.shape[0], 4 * words.shape[1])  # (rows, bytes)
    shifts = torch.arange(0, 8, bits, dtype=torch.int32)  # (codes of a byte,)
    codes = (torch.arange(256, dtype=torch.int32)[:, None] >> shifts) & ((1 << bits) - 1)  # (256, codes of a byte)
    return looked_up(octets, (codes - (1 << (bits - 1))).float())[:, :columns].contiguous()  # (rows, columns)


def pack_columns(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """The inverse of `unpack_columns`.

    Args:
        codes: Whole numbers from ``-2 ** (bits - 1)`` to ``2 ** (bits - 1) - 1`` of any dtype, (rows, columns).
        bits: 1, 2, 4 or 8.

    Returns:
        int32, (rows, ceil(columns * bits / 32)). Bits after the last code are zero.
    """
    import torch

    words, many = -(-codes.shape[1] * bits // 32), 8 // bits
    octets = torch.zeros((codes.shape[0], 4 * words * many), dtype=torch.uint8)  # (rows, codes and a rest)
    octets[:, : codes.shape[1]] = (codes + (1 << (bits - 1))).to(torch.uint8)
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8)  # (codes of a byte,)
    octets = (octets.view(codes.shape[0], -1, many) << shifts).sum(2, dtype=torch.uint8)  # (rows, bytes)
    return octets.view(torch.int32)  # (rows, words)


def unpack_rows(words: torch.Tensor, bits: int, start: int, stop: int) -> torch.Tensor:
    """Rows of signed codes that are packed along their columns.

    Args:
        words: int32, (ceil(rows * bits / 32), columns), the codes as in `unpack_columns`.
        bits: 1, 2, 4 or 8.
        start, stop: The rows.

    Returns:
        float32, (stop - start, columns).
    """
    many = 32 // bits
    first = start // many
    some = words[first : -(-stop // many)].T  # (columns, words)
    return unpack_columns(some, bits, stop - first * many)[:, start - first * many :].T  # (stop - start, columns)


def unpack_e2m1(pairs: torch.Tensor) -> torch.Tensor:
    """FP4 values: a sign, two bits of exponent, one of mantissa; the first of a byte in its low half.

    Args:
        pairs: uint8, (rows, columns / 2).

    Returns:
        float32, (rows, columns).
    """
    import torch

    positive = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
    table = torch.tensor([*positive, *(-value for value in positive)])  # (16,)
    return looked_up(pairs, pairs_of(table))  # (rows, columns)


def pairs_of(table: torch.Tensor) -> torch.Tensor:
    """The values of the two codes of a byte, the first in its low half.

    Args:
        table: float32, (16,): the value of each code.

    Returns:
        float32, (256, 2).
    """
    import torch

    return torch.stack((table.repeat(16), table.repeat_interleave(16)), dim=1)


def looked_up(octets: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """The values that bytes stand for.

    Args:
        octets: uint8, (.., n).
        table: float32, (256,) or (256, k): the values of each byte.

    Returns:
        float32, (.., k * n), in new memory.
    """
    import torch

    # Several values of a byte are moved as one number of their size: torch takes rows of a table far more slowly.
    wide = {4: torch.float32, 8: torch.float64, 16: torch.complex128}.get(4 * table[0].numel())
    entries = table.contiguous().view(wide).flatten() if wide else table  # (256,) or (256, k)
    values = entries.index_select(0, octets.reshape(-1).to(torch.int32))
    return values.view(torch.float32).view(*octets.shape[:-1], octets.shape[-1] * table[0].numel())
