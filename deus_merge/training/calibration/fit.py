"""The closed form: statistics of what the writers of a layer read and of the gradient, and the weights from them.

With phi what the writers read (m,), g the negative gradient behind the layer (d,), and means over tokens,
A = E[phi phi^T], B = E[g phi^T], S = E[g g^T]:

    ridge   W = B (A + damping tr(A) / m I)^-1                            the regression of g on phi
    kfac    W = (S + damping tr(S) / d I)^-1 B (A + damping tr(A) / m I)^-1   a step preconditioned as in K-FAC

References: Martens and Grosse, K-FAC, arXiv 1503.05671, section 6.6 (without their split of the damping);
RFRBoost, arXiv 2501.18283, for residual blocks fitted to the functional gradient.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from ...core.errors import TrainingError
from .triangle import ROWS, Triangle

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class Statistics:
    """Sums over tokens, in float64.

    Args:
        columns: What the writers read together, m.
        width: The size of a hidden state, d.
        with_gradients: Whether S is needed.
        device: Where they are.
    """

    def __init__(self, columns: int, width: int, *, with_gradients: bool, device: torch.device | str = "cpu"):
        import torch

        settings: Any = {"dtype": torch.float64, "device": device}
        self.a = Triangle(columns, device)  # (m, m)
        self.b = torch.zeros((width, columns), **settings)  # (d, m)
        self.s = Triangle(width, device) if with_gradients else None  # (d, d)
        self.tokens = 0
        self._norms: list[Tensor] = []

    def add(self, phi: Tensor, g: Tensor, hidden: Tensor) -> None:
        """Add tokens.

        Args:
            phi: What the writers read, (n, m).
            g: The negative gradients, (n, d).
            hidden: The hidden states that the layer adds to, (n, d).
        """
        self.a.add_products(phi)
        for start in range(0, len(self.b), ROWS):
            self.b[start : start + ROWS] += g[:, start : start + ROWS].T @ phi
        if self.s is not None:
            self.s.add_products(g)
        self._norms.append(hidden.norm(dim=1).double().cpu())  # (n,)
        self.tokens += len(phi)

    @property
    def scale(self) -> float:
        """The median norm of the hidden states."""
        import torch

        return float(torch.cat(self._norms).median())

    def check(self, layer: int) -> None:
        """Check that all sums are finite.

        Raises:
            TrainingError: one is not.
        """
        parts = {"what its writers read": self.a.diagonal(), "the gradients": self.b}
        for name, values in parts.items():
            if not bool(values.isfinite().all()) or not math.isfinite(self.scale):
                raise TrainingError(
                    f"layer {layer}: the statistics are not finite",
                    where=f"layer {layer}",
                    got=f"NaN or infinity in {name}",
                    hint="deus-merge verify finds damaged weights; shorter windows (--length) avoid long contexts",
                )

    def solve(self, method: str, damping: float, layer: int) -> tuple[Tensor, float]:
        """The weights for a step of size 1. A, B and S are used up.

        Args:
            method: ``ridge`` or ``kfac``.
            damping: Multiple of the mean diagonal entry.
            layer: For messages.

        Returns:
            W (d, m) in float64, and the root mean square norm of what it writes.

        Raises:
            TrainingError: rounding makes a matrix indefinite.
        """
        import torch

        ridge = self._factorise(damping, layer, with_gradients=method == "kfac")
        if method == "kfac":
            assert self.s is not None
            self.s.divide_by_transposed_factor(self.b.T)  # B becomes S^-1 B
            self.s.divide_by_factor(self.b.T)
        weights = self.b  # (d, m)
        # E|W phi|^2 = tr(W A W^T) = |W L|^2 - ridge |W|^2, where L is the factor of A + ridge I
        self.a.divide_by_transposed_factor(weights)
        energy = float(torch.linalg.vector_norm(weights)) ** 2
        self.a.divide_by_factor(weights)
        energy -= ridge * float(torch.linalg.vector_norm(weights)) ** 2
        return weights, math.sqrt(max(energy, 0.0))

    def score(self, damping: float, layer: int) -> float:
        """The expansion score tr(S^-1 B A^-1 B^T) / d, with A and S damped as in `solve`. A, B and S are used up.

        Without damping it is the mean of the squared canonical correlations of g with phi: 0 to 1.

        Args:
            damping: Multiple of the mean diagonal entry.
            layer: For messages.

        Raises:
            TrainingError: rounding makes a matrix indefinite.

        Reference: Mitchell et al., Self-Expanding Neural Networks, arXiv 2307.04526.
        """
        import torch

        assert self.s is not None
        self._factorise(damping, layer, with_gradients=True)
        self.s.divide_by_transposed_factor(self.b.T)
        self.a.divide_by_transposed_factor(self.b)
        return float(torch.linalg.vector_norm(self.b)) ** 2 / len(self.b)

    def _factorise(self, damping: float, layer: int, *, with_gradients: bool) -> float:
        """Turn sums into means, damp A and S and factorise them, in place.

        Returns:
            What was added to the diagonal of A.

        Raises:
            TrainingError: rounding makes a matrix indefinite.
        """
        factor = 1 / self.tokens
        self.b *= factor
        self.a.scale(factor)
        ridge = self.a.damp(damping)
        try:
            self.a.factorise()
            if with_gradients:
                assert self.s is not None
                self.s.scale(factor)
                self.s.damp(damping)
                self.s.factorise()
        except ArithmeticError:
            hint = "raise the damping, or use more tokens"
            raise TrainingError(f"layer {layer}: the statistics cannot be inverted", hint=hint) from None
        return ridge
