"""Exact ranks without sorting: numbers are counted by their bits, first the upper ones, then the lower.

A number's rank is its place in a stable ascending sort; so every number has one, also among equals.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_HALF = 1 << 16
_LARGEST = (1 << 31) - 1


def keys(values: torch.Tensor, *, descending: bool = False) -> torch.Tensor:
    """Whole numbers of 31 bits that sort like the magnitudes of the values (as float32), int32.

    Args:
        values: Values of any shape.
        descending: The other way round: the largest magnitude first.
    """
    import torch

    bits = values.abs().to(torch.float32).view(torch.int32)
    return bits.bitwise_xor_(_LARGEST) if descending else bits


@dataclass(frozen=True)
class Cut:
    """The numbers of rank below some r.

    Attributes:
        key: Key of the number of rank r.
        equals: How many of the numbers with this key have a rank below r: the first ones.
    """

    key: int
    equals: int

    @property
    def value(self) -> torch.Tensor:
        """The magnitude of rank r, float32."""
        import torch

        return torch.tensor(self.key, dtype=torch.int32).view(torch.float32)

    def begin(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """A function to be called with the keys of one run after another, that says which ranks are below r: 0 or 1,
        int32."""
        import torch

        left = self.equals

        def below(run: torch.Tensor) -> torch.Tensor:
            nonlocal left
            if self.key > _LARGEST:
                return torch.ones_like(run)
            less = torch.lt(run, self.key, out=torch.empty_like(run))
            if left > 0:
                same = torch.eq(run, self.key, out=torch.empty_like(run))
                count = int(same.sum(dtype=torch.int32))
                if count > left:
                    same.mul_(same.cumsum(0, dtype=torch.int32).le_(left))
                less.add_(same)
                left -= count
            return less

        return below


def cuts(read: Callable[[], Iterable[torch.Tensor]], ranks: Sequence[int]) -> list[Cut]:
    """Where numbers are cut by rank.

    Args:
        read: Gives the numbers' keys (see `keys`), run after run; called twice.
        ranks: From 0 (nothing is below) to the number of numbers (everything is).

    Returns:
        One cut a rank.
    """
    import torch

    upper: torch.Tensor | None = None
    for run in read():
        counts = torch.bincount(run >> 16, minlength=_HALF // 2)  # (2 ** 15,)
        upper = counts if upper is None else upper + counts
    if upper is None:
        upper = torch.zeros(_HALF // 2, dtype=torch.int64)  # (2 ** 15,)
    ends = upper.cumsum(0)
    bins = [int(torch.searchsorted(ends, rank, right=True)) for rank in ranks]
    inside = [b for b in dict.fromkeys(bins) if b < len(ends)]
    lower: dict[int, torch.Tensor] = {}
    for run in read() if inside else ():
        for b in inside:
            counts = torch.bincount(_lower(run, b), minlength=_HALF)  # (2 ** 16,)
            lower[b] = lower[b] + counts if b in lower else counts
    everything = Cut(_LARGEST + 1, 0)
    found = zip(bins, ranks, strict=True)
    return [_cut(b, rank - int(ends[b] - upper[b]), lower[b]) if b in lower else everything for b, rank in found]


def _lower(run: torch.Tensor, upper: int) -> torch.Tensor:
    """The lower bits of those keys of a run that have these upper ones, int32."""
    import torch

    offset = run - (upper << 16)  # (m,)
    if run.device.type != "cpu":
        return offset[(offset >= 0) & (offset < _HALF)]
    unsigned = offset.numpy().view("uint32")  # NumPy selects several times as fast
    return torch.from_numpy(unsigned[unsigned < _HALF].view("int32"))


def _cut(upper: int, rank: int, counts: torch.Tensor) -> Cut:
    """The cut at ``rank`` among the numbers with these upper bits, from counts of their lower ones."""
    import torch

    ends = counts.cumsum(0)
    low = int(torch.searchsorted(ends, rank, right=True))
    return Cut((upper << 16) + low, rank - int(ends[low] - counts[low]))
