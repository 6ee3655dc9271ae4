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

if TYPE_CHECKING:
    import torch
    from torch import Tensor

ROWS = 2048  # of A that are multiplied at once


class Statistics:
    """Sums over tokens, in float64; of A and S only the lower triangle.

    Args:
        columns: What the writers read together, m.
        width: The size of a hidden state, d.
        with_gradients: Whether S is needed.
        device: Where they are.
    """

    def __init__(self, columns: int, width: int, *, with_gradients: bool, device: torch.device | str = "cpu"):
        import torch

        settings: Any = {"dtype": torch.float64, "device": device}
        self.a = torch.zeros((columns, columns), **settings)  # (m, m)
        self.b = torch.zeros((width, columns), **settings)  # (d, m)
        self.s = torch.zeros((width, width), **settings) if with_gradients else None  # (d, d)
        self.tokens = 0
        self._norms: list[Tensor] = []

    def add(self, phi: Tensor, g: Tensor, hidden: Tensor) -> None:
        """Add tokens.

        Args:
            phi: What the writers read, (n, m).
            g: The negative gradients, (n, d).
            hidden: The hidden states that the layer adds to, (n, d).
        """
        _add_products(self.a, phi)
        for start in range(0, len(self.b), ROWS):
            self.b[start : start + ROWS] += (g[:, start : start + ROWS].T @ phi).double()
        if self.s is not None:
            _add_products(self.s, g)
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
        for part in (self.a, self.b) + ((self.s,) if self.s is not None else ()):
            part /= self.tokens
        target = self.b  # (d, m)
        try:
            if method == "kfac":
                assert self.s is not None
                _damp(self.s, damping)
                target = _solve(self.s, target)
            ridge = _damp(self.a, damping)
            weights = _solve(self.a, target.T).T  # (d, m)
        except ArithmeticError:
            hint = "raise --damping, or use more --tokens"
            raise TrainingError(f"layer {layer}: the statistics cannot be inverted", hint=hint) from None
        # E|W phi|^2 = tr(W A W^T), and W (A + ridge I) is the target
        energy = float((weights * target).sum() - ridge * weights.square().sum())
        return weights, math.sqrt(max(energy, 0.0))


def _add_products(total: Tensor, values: Tensor) -> None:
    """Add the lower triangle of values^T values."""
    for start in range(0, len(total), ROWS):
        stop = min(start + ROWS, len(total))
        total[start:stop, :stop] += (values[:, start:stop].T @ values[:, :stop]).double()


def _damp(matrix: Tensor, damping: float) -> float:
    """Add to a diagonal, in place. A matrix of zeros becomes the identity.

    Returns:
        What was added.
    """
    mean = float(matrix.diagonal().mean())
    added = damping * mean if mean > 0 else 1.0
    matrix.diagonal().add_(added)
    return added


def _solve(matrix: Tensor, right: Tensor) -> Tensor:
    """``matrix^-1 right``, the matrix given by its lower triangle, (n, n); right (n, k). On the CPU the factorisation
    takes the place of the matrix.

    Raises:
        ArithmeticError: the matrix is not positive definite.
    """
    import torch

    if matrix.device.type != "cpu":
        factor, info = torch.linalg.cholesky_ex(matrix)
        if int(info):
            raise ArithmeticError
        return torch.cholesky_solve(right, factor)
    import numpy
    import scipy.linalg

    upper: Any = matrix.numpy().T  # in Fortran's order, which LAPACK needs to work in place
    columns = numpy.array(right.numpy(), order="F")
    try:
        factor = scipy.linalg.cho_factor(upper, lower=False, overwrite_a=True, check_finite=False)
    except scipy.linalg.LinAlgError:
        raise ArithmeticError from None
    return torch.from_numpy(scipy.linalg.cho_solve(factor, columns, overwrite_b=True, check_finite=False))
