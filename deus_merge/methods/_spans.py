"""Methods whose result is a combination of the sources with a few numbers as coefficients.

The numbers come from the Gram matrix of the sources, or of their differences to the base model. So however many steps
a method takes on the sphere, the tensors are read twice: once for the matrix, once for the result.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from ..core.tensors import OutputChunk
from ._runs import FlatInputs, total

if TYPE_CHECKING:
    import torch


def gram(inputs: FlatInputs, sources: Sequence[int], *, relative: bool = False) -> torch.Tensor:
    """Dot products of sources taken as flat vectors.

    Args:
        inputs: The inputs.
        sources: Which of them.
        relative: Whether to take their differences to the base model.

    Returns:
        ``G_ij = ⟨x_i, x_j⟩``, (s, s), float64, on the CPU.
    """
    import torch

    read = inputs.delta if relative else inputs.addend
    matrix = torch.zeros(len(sources), len(sources), dtype=torch.float64)  # (s, s)
    for run in inputs.runs():
        vectors = [read(i, run).double() for i in sources]  # (m,) each
        for i, a in enumerate(vectors):
            for j, b in enumerate(vectors[: i + 1]):
                matrix[i, j] += total(a * b).cpu()
    return matrix + matrix.tril(-1).T


def combined(
    inputs: FlatInputs, sources: Sequence[int], coefficients: Sequence[float], *, relative: bool = False
) -> Iterator[OutputChunk]:
    """``Σ c_i x_i``, or relative to the base model: ``b + Σ c_i (x_i - b)``."""
    read = inputs.delta if relative else inputs.own

    def combine(run: slice) -> torch.Tensor:
        result = read(sources[0], run).mul_(float(coefficients[0]))  # (m,)
        for i, coefficient in zip(sources[1:], coefficients[1:], strict=True):
            other = inputs.delta(i, run) if relative else inputs.addend(i, run)  # (m,)
            result.add_(other, alpha=float(coefficient))
        return result.add_(inputs.addend(inputs.base_model, run)) if relative else result

    return inputs.each_run(combine)
