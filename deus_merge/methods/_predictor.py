"""A network that predicts the layer between two layers, and how it learns that from layers between two others.

Reference: Yang et al., LESA, arXiv 2502.13794, sections 3.2 and 3.3; details that the paper leaves open follow the
authors' code: AdamW, batches of 64. A sample is one direction (see `_stacked`) of three successive layers. We hold
some directions out to tell how well the network does, and shuffle within groups of directions and among the groups.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ._stacked import Stacked, group_size

if TYPE_CHECKING:
    import torch

BATCH = 64
_HELD_OUT = 16  # one direction in this many is not learned from
_BETA1, _BETA2, _EPSILON, _DECAY = 0.9, 0.999, 1e-8, 0.01  # of AdamW


@dataclass(frozen=True)
class Training:
    """How a network learns.

    Attributes:
        epochs: How often it sees every sample.
        width: Units of its two hidden layers.
        learning_rate: Learning rate of AdamW.
        norm_weight: λ of the loss ``(1 - λ) mean (p - v)² + λ (|p| - |v|)²`` of predictions p of batches v.
    """

    epochs: int
    width: int
    learning_rate: float
    norm_weight: float


class Predictor:
    """A network of three layers from two directions, (2m,), to the one between them, (m,).

    Args:
        m: Columns of a weight.
        width: Units of the hidden layers.
        random: Where its start comes from.
        like: Gives dtype and device.
    """

    def __init__(self, m: int, width: int, random: torch.Generator, like: torch.Tensor):
        import torch

        self.weights: list[torch.Tensor] = []  # (in, out) and (1, out) of each layer
        for inputs, outputs in ((2 * m, width), (width, width), (width, m)):
            for rows in (inputs, 1):
                start = torch.empty(rows, outputs, dtype=like.dtype).uniform_(-1, 1, generator=random)
                self.weights.append(start.mul_(1 / math.sqrt(inputs)).to(like.device))

    def __call__(self, below: torch.Tensor, above: torch.Tensor) -> torch.Tensor:
        """(b, m) and (b, m) -> (b, m)."""
        import torch

        w1, b1, w2, b2, w3, b3 = self.weights
        hidden = torch.addmm(b1, torch.cat((below, above), dim=1), w1).relu_()  # (b, width)
        return torch.addmm(b3, torch.addmm(b2, hidden, w2).relu_(), w3)


def learn(
    stacked: Stacked, training: Training, random: torch.Generator, hold: bool
) -> tuple[Predictor, dict[str, float]]:
    """Train a network on every layer that lies between two others.

    Args:
        stacked: The weights.
        training: How.
        random: For its start, and for the order of samples.
        hold: Whether directions may stay in memory from epoch to epoch. The result is the same.

    Returns:
        The network, and diagnostics: steps, the mean loss of the last epoch, and errors on directions held out. These
        are relative errors of the part of a weight that those directions make up, over all layers between two others:
        of the network's predictions, and of the mean of the two neighbours.
    """
    import torch

    m = stacked.read(0).shape[1]
    network = Predictor(m, training.width, random, stacked.u)
    order = torch.randperm(stacked.rank, generator=random).to(stacked.u.device)  # (r,)
    size = group_size(stacked.layers, m)
    aside = min(size, stacked.rank // _HELD_OUT)
    held, seen = order[:aside], order[aside:]
    groups = _Groups(stacked, seen.split(size), hold)
    adam = _AdamW(network.weights, training.learning_rate)
    for _ in range(training.epochs):
        losses: list[torch.Tensor] = []
        for number in torch.randperm(len(groups.which), generator=random).tolist():
            for below, between, above in _batches(groups[number], random):
                loss, gradients = _loss(network, below, between, above, training.norm_weight)
                adam.step(gradients)
                losses.append(loss)
    progress = {"steps": training.epochs * len(losses), "train_loss": float(torch.stack(losses).mean())}
    return network, progress | _errors(stacked, network, held)


def predict(stacked: Stacked, network: Predictor, below: int, above: int) -> torch.Tensor:
    """The weight between those of two layers, (n, m)."""
    import torch

    n, m = stacked.read(below).shape
    weight = torch.zeros(n, m, dtype=stacked.u.dtype, device=stacked.u.device)
    for which in torch.arange(stacked.rank, device=weight.device).split(group_size(stacked.layers, m)):
        new = network(*stacked.directions((below, above), which))  # (c, m)
        weight.addmm_(stacked.u[:, which] * stacked.s[which], new)
    return weight


class _Groups:
    """Directions of all layers, group by group, (L, c, m): held in memory, or computed again at every access."""

    def __init__(self, stacked: Stacked, which: Sequence[torch.Tensor], hold: bool):
        self.which = which
        self._stacked, self._hold = stacked, hold
        self._held: dict[int, torch.Tensor] = {}

    def __getitem__(self, number: int) -> torch.Tensor:
        if number in self._held:
            return self._held[number]
        directions = self._stacked.directions(range(self._stacked.layers), self.which[number])
        if self._hold:
            self._held[number] = directions
        return directions


def _batches(group: torch.Tensor, random: torch.Generator) -> Iterator[tuple[torch.Tensor, ...]]:
    """Samples of a group, (L, c, m), in random order: directions of three successive layers, (b, m) each."""
    import torch

    layers, count, m = group.shape
    rows = group.reshape(-1, m)  # (L * c, m)
    for batch in torch.randperm((layers - 2) * count, generator=random).to(group.device).split(BATCH):
        yield tuple(rows[batch + skip * count] for skip in range(3))


def _loss(
    network: Predictor, below: torch.Tensor, true: torch.Tensor, above: torch.Tensor, norm_weight: float
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """The loss of a batch, (b, m) each, and its gradient by every weight."""
    import torch

    with torch.enable_grad():
        for weight in network.weights:
            weight.requires_grad_()
        predicted = network(below, above)  # (b, m)
        error, norms = (predicted - true).square().mean(), (predicted.norm() - true.norm()).square()
        loss = (1 - norm_weight) * error + norm_weight * norms
        gradients = torch.autograd.grad(loss, network.weights)
        for weight in network.weights:
            weight.requires_grad_(False)
    return loss.detach(), gradients


class _AdamW:
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101). torch's own brings a compiler of 100 MB with it."""

    def __init__(self, weights: Sequence[torch.Tensor], learning_rate: float):
        import torch

        self._weights, self._rate, self._count = weights, learning_rate, 0
        self._means = [torch.zeros_like(w) for w in weights]
        self._squares = [torch.zeros_like(w) for w in weights]

    def step(self, gradients: Sequence[torch.Tensor]) -> None:
        """One step down, in place."""
        self._count += 1
        unbias1, unbias2 = 1 - _BETA1**self._count, 1 - _BETA2**self._count
        for weight, gradient, mean, square in zip(self._weights, gradients, self._means, self._squares, strict=True):
            mean.lerp_(gradient, 1 - _BETA1)
            square.mul_(_BETA2).addcmul_(gradient, gradient, value=1 - _BETA2)
            weight.mul_(1 - self._rate * _DECAY)
            size = square.div(unbias2).sqrt_().add_(_EPSILON)
            weight.addcdiv_(mean, size, value=-self._rate / unbias1)


def _errors(stacked: Stacked, network: Predictor, held: torch.Tensor) -> dict[str, float]:
    import torch

    if not len(held):
        return {}
    directions = stacked.directions(range(stacked.layers), held)  # (L, c, m)
    scale = stacked.s[held, None]  # (c, 1)
    sums = torch.zeros(3, dtype=torch.float64)
    for below, true, above in zip(directions, directions[1:], directions[2:], strict=False):  # (c, m) each
        parts = network(below, above) - true, (below + above) / 2 - true, true
        sums += torch.stack([(scale * part).double().square().sum() for part in parts]).cpu()
    ours, average = (sums[:2] / sums[2].clamp(min=torch.finfo(sums.dtype).tiny)).sqrt().tolist()
    return {"held_out_error": ours, "held_out_error_of_average": average}
