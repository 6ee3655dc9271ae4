"""The shape of a tensor, cut as layouts cut tensors: planning needs no torch, whose import takes longer than a plan."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence


class Extents:
    """A tensor without values, with the few methods of ``torch.Tensor`` that `layouts.Layout.split` calls.

    Attributes:
        shape: Its sizes.
    """

    def __init__(self, shape: Sequence[int]):
        self.shape = tuple(shape)

    def __len__(self) -> int:
        if not self.shape:
            raise ValueError("a scalar has no length")
        return self.shape[0]

    def __iter__(self) -> Iterator[Extents]:
        return (Extents(self.shape[1:]) for _ in range(len(self)))

    def __getitem__(self, index: slice | tuple[slice | int, ...]) -> Extents:
        """Cut the leading axes: by a slice, or at one place.

        Raises:
            IndexError: there are fewer axes, or no such place.
        """
        indices = index if isinstance(index, tuple) else (index,)
        if len(indices) > len(self.shape):
            raise IndexError(f"{self.shape} has no {len(indices)} axes")
        sizes = []
        for size, at in zip(self.shape, indices, strict=False):
            if isinstance(at, slice):
                sizes.append(len(range(size)[at]))
            elif not -size <= at < size:
                raise IndexError(f"no place {at} on an axis of {size}")
        return Extents((*sizes, *self.shape[len(indices) :]))

    def split(self, sizes: Sequence[int], dim: int = 0) -> tuple[Extents, ...]:
        """Parts of given sizes along one axis.

        Raises:
            ValueError: they are not the whole axis.
        """
        if not self.shape or sum(sizes) != self.shape[dim] or any(size < 0 for size in sizes):
            raise ValueError(f"{self.shape} cannot be cut into {sizes}")
        return tuple(Extents((*self.shape[:dim], size, *self.shape[dim + 1 :])) for size in sizes)

    def unflatten(self, dim: int, sizes: Sequence[int]) -> Extents:
        """One axis as several; one of the sizes may be -1.

        Raises:
            ValueError: their product is not the axis.
        """
        known = math.prod(size for size in sizes if size != -1)
        axis = self.shape[dim] if self.shape else 0
        found = [axis // known if size == -1 and known else size for size in sizes]
        if not self.shape or min(found) < 0 or math.prod(found) != axis:
            raise ValueError(f"{self.shape} has no axis of {sizes}")
        return Extents((*self.shape[:dim], *found, *self.shape[dim + 1 :]))

    def t(self) -> Extents:
        """A matrix transposed.

        Raises:
            ValueError: it has more than two axes.
        """
        if len(self.shape) > 2:
            raise ValueError(f"{self.shape} is no matrix")
        return Extents(self.shape[::-1])
