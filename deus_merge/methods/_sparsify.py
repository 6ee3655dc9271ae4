"""Which elements of a task vector are kept: by magnitude, by chance, or by both.

A choice is made once for a whole task vector δ. `Begin` starts a pass over it: it returns a function that is called
with one run of δ after another and returns 1 for elements to keep and 0 for others, (m,). Every pass keeps the same
ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import islice
from typing import TYPE_CHECKING

from ._random import Draws
from ._ranks import cuts, keys
from ._runs import FlatInputs, total

if TYPE_CHECKING:
    import torch

Begin = Callable[[], "Callable[[torch.Tensor], torch.Tensor]"]
_TINY = 1e-7  # sums at most this large are not scaled
_TOSS = 1 << 20  # coins


def largest(inputs: FlatInputs, source: int, density: float) -> Begin | None:
    """The ``density`` of δ with the largest magnitudes, at least one of them; among equals the first.

    Reference: Yadav et al., TIES-Merging, arXiv 2306.01708, section 3.1.

    Returns:
        None for all of them.
    """
    if density >= 1 or density <= 0:
        return None if density >= 1 else _nothing
    count = max(1, int(density * inputs.numel))
    (cut,) = cuts(lambda: _keys(inputs, source, descending=True), [count])

    def begin():
        below = cut.begin()
        return lambda delta: below(keys(delta, descending=True))

    return begin


def middling(inputs: FlatInputs, source: int, density: float, gamma: float) -> Begin | None:
    """The ``density`` of δ with the largest magnitudes when the ``gamma`` of the very largest are left out.

    Where that leaves too few, fewer outliers are left out.

    Reference: Davari, Belilovsky, Model Breadcrumbs, arXiv 2312.06795, section 3.

    Returns:
        None for all of them.
    """
    if density >= 1 or density <= 0:
        return None if density >= 1 else _nothing
    count = int(density * inputs.numel)
    first = max(0, inputs.numel - count - int(gamma * inputs.numel))
    small, rest = cuts(lambda: _keys(inputs, source), [first, first + count])

    def begin():
        too_small, small_enough = small.begin(), rest.begin()

        def kept(delta: torch.Tensor) -> torch.Tensor:
            run = keys(delta)  # (m,)
            return small_enough(run).sub_(too_small(run))

        return kept

    return begin


def by_chance(inputs: FlatInputs, source: int, density: float) -> Begin | None:
    """Each element with probability ``density``.

    Reference: Yu et al., DARE, arXiv 2311.03099, section 3.2.

    Returns:
        None for all of them.
    """
    if density >= 1 or density <= 0:
        return None if density >= 1 else _nothing

    fallen: list = []

    def begin():
        coins = _coins(inputs, source, density, fallen)
        return lambda delta: next(coins)

    return begin


def by_ranked_chance(inputs: FlatInputs, source: int, density: float, epsilon: float) -> Begin | None:
    """Each element with a probability that rises with the rank of its magnitude in its row.

    From ``density - epsilon`` for a row's smallest to ``density + epsilon`` for its largest, in equal steps. Rows are
    along the second axis; a vector is one row. Runs must hold whole rows: see `_runs.row_length`.

    Reference: Deep et al., DELLA-Merging, arXiv 2406.11617, section 3.1.

    Returns:
        None for all of them.
    """
    if density >= 1 or density <= 0:
        return None if density >= 1 else _nothing
    shape = inputs.output.shape if len(inputs.output.shape) > 1 else (1, inputs.numel)
    length, inner = shape[1], math.prod(shape[2:])

    def begin():
        import torch

        draws = Draws(inputs.block.generator(inputs.output, source))

        def kept(delta: torch.Tensor) -> torch.Tensor:
            magnitudes = delta.abs().view(-1, length, inner)  # (rows, length, inner)
            order = magnitudes.argsort(dim=1, stable=True)  # (rows, length, inner)
            rank = torch.linspace(-epsilon, epsilon, length) if length > 1 else torch.zeros(1)  # (length,)
            chances = (density + rank).view(-1, 1).to(delta.device)  # (length, 1)
            numbers = draws.uniform(tuple(order.shape)).to(delta.device)  # (rows, length, inner)
            drawn = numbers < chances  # (rows, length, inner), by rank
            return torch.empty_like(drawn).scatter_(1, order, drawn).view(-1)  # (m,)

        return kept

    return begin


def restoring_factor(inputs: FlatInputs, source: int, begin: Begin | None) -> float:
    """The factor that brings the sum of magnitudes of the kept elements of δ to that of all of δ."""
    if begin is None:
        return 1.0
    kept, before, after = begin(), 0.0, 0.0
    for run in inputs.runs():
        delta = inputs.delta(source, run)  # (m,)
        mask = kept(delta)  # (m,)
        delta.abs_()
        before += float(total(delta))
        after += float(total(delta.mul_(mask)))
    return before / after if min(before, after) >= _TINY else 1.0


def _coins(inputs: FlatInputs, source: int, density: float, fallen: list) -> Iterator[torch.Tensor]:
    """Coins for one run after another, on the device of the inputs: a run is a part of a toss, or several tosses."""
    import torch

    tosses, length, device = _tosses(inputs, source, density, fallen), inputs.run_length, inputs.stored[0].device
    if length <= _TOSS:
        for coins in tosses:
            yield from coins.to(device).split(length)
    else:
        while several := list(islice(tosses, length // _TOSS)):
            yield torch.cat(several).to(device)


def _tosses(inputs: FlatInputs, source: int, density: float, fallen: list) -> Iterator[torch.Tensor]:
    """Coins on the CPU, `_TOSS` at once on any device, so that they fall alike. Another toss would take ten times as
    long as reading how they fell the first time, which ``fallen`` holds: a bit each."""
    import numpy
    import torch

    draws = Draws(inputs.block.generator(inputs.output, source))
    for number, start in enumerate(range(0, inputs.numel, _TOSS)):
        count = min(_TOSS, inputs.numel - start)
        if number < len(fallen):
            yield torch.from_numpy(numpy.unpackbits(fallen[number], count=count))  # (count,)
        else:
            coins = draws.coins(density, count)  # (count,)
            fallen.append(numpy.packbits(coins.numpy()))
            yield coins


def _keys(inputs: FlatInputs, source: int, *, descending: bool = False) -> Iterator[torch.Tensor]:
    for run in inputs.runs():
        yield keys(inputs.delta(source, run), descending=descending)


def _nothing():
    return lambda delta: delta != delta
