"""Stored tensors that consist of several matrices: which rows, columns and axes are which.

Alignment sees matrices by role; what it gives is packed again into the stored tensor. A layout only cuts the stored
tensor into views (`Layout.split`), so that packing is copying into the views of an empty one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

    from .extents import Extents
    from .spec import Heads, TensorSpec

Cut = TypeVar("Cut", "Tensor", "Extents")


class Layout(ABC):
    """How a stored tensor consists of matrices or vectors."""

    def fitted(self, shapes: Mapping[str, Sequence[int]], width: int | None) -> Layout:
        """The layout of a layer whose tensors have these shapes.

        Args:
            shapes: By role.
            width: The size of the residual stream, where the layer's norms say it.
        """
        return self

    @abstractmethod
    def specs(self, shape: Sequence[int]) -> tuple[TensorSpec, ...]:
        """What it consists of, in the order of alignment.

        Args:
            shape: The stored tensor's.
        """

    @abstractmethod
    def split(self, stored: Cut, heads: Heads | None) -> Mapping[str, Cut]:
        """Views of the stored tensor: role -> the matrix (.., columns), whose leading axes together are its rows, or
        for a vector (..).

        Args:
            stored: The whole tensor, or its shape alone.
            heads: The layer's attention heads.
        """


@dataclass(frozen=True)
class Stacked(Layout):
    """Matrices one above the other, ``[q; k; v]`` or ``[gate; up]``: (n_1 + n_2 + .., columns).

    Attributes:
        parts: What is stacked. Rows of ``query_heads``, ``key_heads``, ``value_heads`` and ``rotary`` are counted by
            the heads, all others have equal shares of the rest.
    """

    parts: tuple[TensorSpec, ...]

    def specs(self, shape):
        return self.parts

    def split(self, stored, heads):
        known = [_head_rows(part, heads) for part in self.parts]
        rest = len(stored) - sum(n for n in known if n is not None)
        rows = [rest // known.count(None) if n is None else n for n in known]
        return {part.role: view for part, view in zip(self.parts, stored.split(rows), strict=True)}


@dataclass(frozen=True)
class PerGroup(Layout):
    """For each key-value group its query heads, its key head and its value head: (G·(H/G + 2)·h, columns). With as
    many groups as heads this is q, k and v of each head.

    Attributes:
        parts: q, k and v (or their biases).
    """

    parts: tuple[TensorSpec, TensorSpec, TensorSpec]

    def specs(self, shape):
        return self.parts

    def split(self, stored, heads):
        q, k, v = self.parts
        assert heads is not None, "planning refuses layers whose heads are unknown"
        groups = stored.unflatten(0, (heads.key_value, -1, heads.size))  # (G, H/G + 2, h, ..)
        count = heads.query // heads.key_value
        return {q.role: groups[:, :count], k.role: groups[:, count : count + 1], v.role: groups[:, count + 1 :]}


@dataclass(frozen=True)
class PerHead(Layout):
    """For each query head the rows of every part, one part after the other: (H·(h_1 + h_2 + ..), columns).

    Attributes:
        parts: A query and its gate, for example. What goes along with query heads has the rows that the others leave.
    """

    parts: tuple[TensorSpec, ...]

    def specs(self, shape):
        return self.parts

    def split(self, stored, heads):
        assert heads is not None, "planning refuses layers whose heads are unknown"
        by_head = stored.unflatten(0, (heads.query, -1))  # (H, h_1 + h_2 + .., ..)
        sizes = {"query_heads": heads.size, "key_heads": heads.size, "value_heads": heads.values}
        known = [sizes.get(part.out_space or "") for part in self.parts]
        rest = by_head.shape[1] - sum(n for n in known if n is not None)
        rows = [rest if n is None else n for n in known]
        return {part.role: view for part, view in zip(self.parts, by_head.split(rows, 1), strict=True)}


@dataclass(frozen=True)
class InBlocks(Layout):
    """For each block of consecutive heads the rows of every part, one part after the other: (b·p·n, columns).

    Attributes:
        parts: q, v and k, for example.
        blocks: b, a divisor of the number of heads.
    """

    parts: tuple[TensorSpec, ...]
    blocks: int = 4

    def specs(self, shape):
        return self.parts

    def split(self, stored, heads):
        by_block = stored.unflatten(0, (self.blocks, len(self.parts), -1))  # (b, p, n, ..)
        return {part.role: by_block[:, i] for i, part in enumerate(self.parts)}


@dataclass(frozen=True)
class Alternating(Layout):
    """Rows of the parts in turn: gate 0, up 0, gate 1, up 1 ...; (p·n, columns)."""

    parts: tuple[TensorSpec, ...]

    def specs(self, shape):
        return self.parts

    def split(self, stored, heads):
        return {part.role: stored[i :: len(self.parts)] for i, part in enumerate(self.parts)}


@dataclass(frozen=True)
class Transposed(Layout):
    """Stored as (inputs, outputs).

    Attributes:
        inner: The layout of its transpose, or the one matrix that this is.
    """

    inner: Layout | TensorSpec

    def specs(self, shape):
        return self.inner.specs(shape[::-1]) if isinstance(self.inner, Layout) else (self.inner,)

    def split(self, stored, heads):
        if isinstance(self.inner, Layout):
            return self.inner.split(stored.t(), heads)
        return {self.inner.role: stored.t()}


@dataclass(frozen=True)
class Flattened(Layout):
    """A vector that is stored with several axes: norms of every head (H, h).

    Attributes:
        inner: The vector.
    """

    inner: TensorSpec

    def specs(self, shape):
        return (self.inner,)

    def split(self, stored, heads):
        return {self.inner.role: stored}


@dataclass(frozen=True)
class Experts(Layout):
    """The tensors of all experts in one: (E, ..).

    Attributes:
        inner: The layout of one expert's, or the one matrix or vector that it is; roles and spaces have ``{e}`` in
            place of the expert's number.
    """

    inner: Layout | TensorSpec

    def specs(self, shape):
        inner = self.inner.specs(shape[1:]) if isinstance(self.inner, Layout) else (self.inner,)
        return tuple(spec.of_expert(e) for e in range(shape[0]) for spec in inner)

    def split(self, stored, heads):
        views = {}
        for e, one in enumerate(stored):
            inner = self.inner.split(one, heads) if isinstance(self.inner, Layout) else {self.inner.role: one}
            views |= {role.replace("{e}", str(e)): view for role, view in inner.items()}
        return views


@dataclass(frozen=True)
class EitherWay(Layout):
    """Stored as (.., outputs, inputs) by some, as (.., inputs, outputs) by others; the size of the residual stream says
    which.

    Attributes:
        inner: The layout for (.., outputs, inputs).
        turned: That for the other.
        axes: Roles that are stored alike, each with its axis of the residual stream for ``inner``.
    """

    inner: Layout
    turned: Layout
    axes: tuple[tuple[str, int], ...]

    def fitted(self, shapes, width):
        if all(shapes[role][axis] == width for role, axis in self.axes if role in shapes):
            return self.inner
        return self.turned

    def specs(self, shape):
        return self.inner.specs(shape)

    def split(self, stored, heads):
        return self.inner.split(stored, heads)


def _head_rows(part: TensorSpec, heads: Heads | None) -> int | None:
    """The rows of q, k, v or of components that all heads share; None for another role."""
    if heads is None:
        return None
    rows = {"query_heads": heads.query * heads.size, "key_heads": heads.key_value * heads.size}
    rows |= {"value_heads": heads.key_value * heads.values, "rotary": heads.rotary_size or 0}
    return rows.get(part.out_space or "")
