"""Methods whose result is a combination of the sources with a few numbers as coefficients.

The numbers come from the Gram matrix of the sources, or of their differences to the base model. So however many steps
a method takes on the sphere, the tensors are read twice: once for the matrix, once for the result.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from ._runs import Pieces, total
from .base import Made

if TYPE_CHECKING:
    import torch


def gram(pieces: Pieces, sources: Sequence[int], *, relative: bool = False) -> torch.Tensor:
    """Dot products of sources taken as flat vectors.

    Args:
        pieces: The inputs.
        sources: Which of them.
        relative: Of their differences to the base model.

    Returns:
        ``G_ij = ⟨x_i, x_j⟩``, (s, s), float64, on the CPU.
    """
    import torch

    read = pieces.delta if relative else pieces.addend
    matrix = torch.zeros(len(sources), len(sources), dtype=torch.float64)  # (s, s)
    for run in pieces.runs():
        vectors = [read(i, run).double() for i in sources]  # (m,) each
        for i, a in enumerate(vectors):
            for j, b in enumerate(vectors[: i + 1]):
                matrix[i, j] += total(a * b).cpu()
    return matrix + matrix.tril(-1).T


def combined(
    pieces: Pieces, sources: Sequence[int], coefficients: Sequence[float], *, relative: bool = False
) -> Iterator[Made]:
    """``Σ c_i x_i``, or relative to the base model: ``b + Σ c_i (x_i - b)``."""
    read = pieces.delta if relative else pieces.own

    def combine(run: slice) -> torch.Tensor:
        result = read(sources[0], run).mul_(float(coefficients[0]))  # (m,)
        for i, coefficient in zip(sources[1:], coefficients[1:], strict=True):
            other = pieces.delta(i, run) if relative else pieces.addend(i, run)  # (m,)
            result.add_(other, alpha=float(coefficient))
        return result.add_(pieces.addend(pieces.base, run)) if relative else result

    return pieces.made(combine)
