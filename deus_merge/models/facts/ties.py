"""The forms of what ties layers to each other, to their numbers or to the depth."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from .base import Changes, Form, Key, Pinned, Scope, Unsayable, Use, dotted, path
from .values import integers


@dataclass(frozen=True)
class Shared(Form):
    """A list that says which layers reuse the result of the nearest "full" layer before them.

    The value of a layer is its entry with the number of the layer whose result it uses, or None where no other layer
    uses the same; in an output, each layer must still use that of the same one.

    Attributes:
        form: The form that gives the entries.
        full: The entry of layers that use their own result.
    """

    form: Form
    full: str = "full"

    @property
    def explicit(self) -> bool:  # type: ignore[override]
        return self.form.explicit

    @property
    def keys(self) -> tuple[Key, ...]:
        return self.form.keys

    def read(self, scope: Scope) -> Sequence[Any] | None:
        entries = self.form.read(scope)
        if entries is None:
            return None
        used, uses = None, []
        for i, entry in enumerate(entries):
            used = i if entry == self.full else used
            uses.append(used)
        return [Use(entry, of if uses.count(of) > 1 else None) for entry, of in zip(entries, uses, strict=True)]

    def write(self, scope: Scope, values: Sequence[Any]) -> Changes:
        used = None
        for entry, wanted in values:
            if entry == self.full:
                used = wanted
            elif wanted != used or used is None:
                key = dotted(self.keys[0]) if self.keys else "the default"
                raise Unsayable(key, "lets a layer of the output reuse the result of another layer than before")
        return self.form.write(scope, [entry for entry, _ in values])


@dataclass(frozen=True)
class Sources(Form):
    """A list of the numbers of the layers whose keys and values each layer uses, mostly its own."""

    key: Key

    @property
    def keys(self) -> tuple[Key, ...]:
        return (self.key,)

    def read(self, scope: Scope) -> Sequence[Any] | None:
        sources = scope.get(self.key)
        if sources is None:
            return None
        if integers(sources, self.key) == list(range(scope.depth)):
            return ["own"] * scope.depth
        reason = "lets layers use the keys and values of others, which are not where they were"
        return [Pinned(i, scope.depth, reason) for i in range(scope.depth)]

    def write(self, scope: Scope, values: Sequence[Any]) -> Changes:
        check_pinned(dotted(self.key), values)
        return {path(self.key): list(range(len(values)))} if all(value == "own" for value in values) else {}


@dataclass(frozen=True)
class OverRootDepth(Form):
    """A factor of each residual branch that is divided by the root of the depth (MiniCPM's ``scale_depth``)."""

    key: Key
    default: float | None = None

    @property
    def keys(self) -> tuple[Key, ...]:
        return (self.key,)

    def read(self, scope: Scope) -> Sequence[Any] | None:
        factor = scope.get(self.key, self.default)
        if isinstance(factor, bool) or not isinstance(factor, (int, float)):
            return None
        return [float(factor) / math.sqrt(scope.depth)] * scope.depth

    def write(self, scope: Scope, values: Sequence[Any]) -> Changes:
        if any(value != values[0] for value in values):
            raise Unsayable(dotted(self.key), "is one for all layers")
        now = self.read(Scope(scope.section, scope.root, len(values)))
        return {} if now and now[0] == values[0] else {path(self.key): _root_times(values[0], len(values))}


def _root_times(value: float, depth: int) -> float:
    """The factor whose quotient by the root of the depth is the value, to the last bit where there is one."""
    best = value * math.sqrt(depth)
    near = [best]
    for towards in (math.inf, -math.inf):
        factor = best
        for _ in range(4):
            factor = math.nextafter(factor, towards)
            near.append(factor)
    return next((factor for factor in near if factor / math.sqrt(depth) == value), best)


@dataclass(frozen=True)
class Pin(Form):
    """Something that ties layers to their numbers. It moves nothing: other numbers are an error.

    Attributes:
        name: The key of the config, or what else the error names.
        reason: Why, as the end of a sentence about it.
        where: Which layers are tied, for a config; None where it says that no layer is.
        by_depth: Whether they are tied to the depth, too.
    """

    name: Key
    reason: str
    where: Callable[[Scope], Sequence[bool] | None]
    by_depth: bool = True

    @property
    def keys(self) -> tuple[Key, ...]:
        return (self.name,)

    def read(self, scope: Scope) -> Sequence[Any] | None:
        tied = self.where(scope)
        if tied is None or not any(tied):
            return None
        depth = scope.depth if self.by_depth else None
        return [Pinned(i, depth, self.reason) if is_tied else None for i, is_tied in enumerate(tied)]

    def write(self, scope: Scope, values: Sequence[Any]) -> Changes:
        check_pinned(dotted(self.name), values)
        return {}


@dataclass(frozen=True)
class First(Form):
    """The first layers have something that the others lack, whatever the config says: it stays with them.

    Attributes:
        name: What the error names.
        count: How many.
    """

    name: Key
    count: Callable[[Scope], int]

    @property
    def keys(self) -> tuple[Key, ...]:
        return ()

    def read(self, scope: Scope) -> Sequence[Any] | None:
        count = self.count(scope)
        return [min(i, count) for i in range(scope.depth)] if count else None

    def write(self, scope: Scope, values: Sequence[Any]) -> Changes:
        count = self.count(scope)
        if list(values) != [min(i, count) for i in range(len(values))]:
            first = f"the first {count} layers" if count > 1 else "the first layer"
            raise Unsayable(dotted(self.name), f"makes {first} unlike all others: no other layer can stand there")
        return {}


def check_pinned(name: str, values: Sequence[Any]) -> None:
    """Check that tied layers have the numbers that they are tied to.

    Raises:
        Unsayable: one has not.
    """
    for i, value in enumerate(values):
        if isinstance(value, Pinned) and value != Pinned(i, value.depth and len(values)):
            raise Unsayable(name, value.reason)
