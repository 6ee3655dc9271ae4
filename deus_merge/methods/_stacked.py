"""The weights of one role in all layers of a model as one matrix, decomposed with one layer in memory at a time.

``[W_1 ... W_L] = U S [V_1 ... V_L]``. U and S come from the eigenvectors and values of ``Σ W_i W_iᵀ``, which adds up
layer by layer; V_i is ``S⁻¹ Uᵀ W_i``, computed on demand. A row of V_i is one *direction* of the decomposition.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_COLUMNS = 512  # widened to float64 at once
_GROUP = 1 << 24  # elements of a group of directions, of all layers


@dataclass(frozen=True)
class Stacked:
    """A decomposition.

    Attributes:
        read: Layer -> its weight, (n, m), in the arithmetic's dtype.
        layers: L.
        u: (n, r), with r the rank.
        s: Singular values, (r,), descending, above 0.
    """

    read: Callable[[int], torch.Tensor]
    layers: int
    u: torch.Tensor
    s: torch.Tensor

    @property
    def rank(self) -> int:
        return len(self.s)

    def directions(self, layers: Sequence[int], which: torch.Tensor) -> torch.Tensor:
        """Rows ``which``, (c,), of V of some layers, (l, c, m)."""
        import torch

        basis = (self.u[:, which] / self.s[which]).T  # (c, n)
        rows = torch.empty(0)
        for place, i in enumerate(layers):
            weight = self.read(i)  # (n, m)
            if place == 0:
                rows = weight.new_empty(len(layers), len(which), weight.shape[1])  # (l, c, m)
            torch.mm(basis, weight, out=rows[place])
        return rows

    def effective_rank(self) -> float:
        """The exponential of the entropy of the singular values' shares (Roy and Vetterli, 2007)."""
        shares = self.s.double() / self.s.double().sum()  # (r,)
        return float((-shares * shares.log()).sum().exp())


def decompose(read: Callable[[int], torch.Tensor], layers: int) -> Stacked:
    """Decompose the weights of ``layers`` layers, each (n, m). Directions without weight are left out.

    Products are added up and decomposed in float64: squares of singular values need twice their digits. The largest
    entry of each column of U is positive, since the sign of an eigenvector is the library's choice.
    """
    import torch

    first = read(0)  # (n, m)
    products = torch.zeros(len(first), len(first), dtype=torch.float64, device=first.device)  # (n, n)
    for i in range(layers):
        for columns in read(i).split(_COLUMNS, dim=1):  # (n, columns)
            wide = columns.double()
            products.addmm_(wide, wide.T)
    values, vectors = torch.linalg.eigh(products)  # (n,) ascending, (n, n)
    del products
    noise = values[-1] * max(len(values), layers * first.shape[1]) * torch.finfo(values.dtype).eps
    rank = min(int((values > noise).sum()), layers * first.shape[1])
    u = vectors[:, len(values) - rank :].flip(1)  # (n, r)
    u *= u.gather(0, u.abs().argmax(0, keepdim=True)).sign()
    return Stacked(read, layers, u.to(first.dtype), values[len(values) - rank :].sqrt().to(first.dtype).flip(0))


def group_size(layers: int, columns: int) -> int:
    """How many directions of V of all layers, each (m,), are in memory at once."""
    return max(8, _GROUP // (layers * columns))


def decomposing_memory(rows: int) -> int:
    """Bytes that `decompose` takes at most, besides one layer: products, eigenvectors and the workspace of eigh."""
    return 8 * (5 * rows**2 + 2 * rows * _COLUMNS)
