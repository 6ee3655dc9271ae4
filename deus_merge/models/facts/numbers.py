"""The forms that name layers by their numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from .base import Changes, Form, Key, Scope, Unsayable, dotted, path
from .values import integers, two_kinds


@dataclass(frozen=True)
class Numbers(Form):
    """The numbers of the layers of one kind.

    Attributes:
        key: The list's key.
        inside, outside: The values of the layers that are in it, and of the others.
        first: The number of the first layer.
        default: Gives the numbers for a depth where the key is missing; None: a config without it says nothing.
    """

    key: Key
    inside: Any = True
    outside: Any = False
    first: int = 0
    default: Callable[[int], Iterable[int]] | None = None
    explicit: ClassVar[bool] = True

    @property
    def keys(self) -> tuple[Key, ...]:
        return (self.key,)

    def read(self, scope: Scope) -> Sequence[Any] | None:
        numbers = scope.get(self.key)
        if numbers is None and self.default is not None:
            numbers = list(self.default(scope.depth))
        if numbers is None:
            return None
        chosen = {number - self.first for number in integers(numbers, self.key)}
        return [self.inside if i in chosen else self.outside for i in range(scope.depth)]

    def write(self, scope: Scope, values: Sequence[Any]) -> Changes:
        two_kinds(values, (self.inside, self.outside), self.key)
        return {path(self.key): [i + self.first for i, value in enumerate(values) if value == self.inside]}


@dataclass(frozen=True)
class Marks(Form):
    """The numbers of layers that belong to entries of something else, in the same order: none may go, or come twice."""

    key: Key
    first: int = 0

    @property
    def keys(self) -> tuple[Key, ...]:
        return (self.key,)

    def read(self, scope: Scope) -> Sequence[Any] | None:
        value = scope.get(self.key)
        if value is None or value == []:
            return None
        numbers = integers([value] if isinstance(value, int) else value, self.key)
        order = {number - self.first: k for k, number in enumerate(numbers)}
        return [order.get(i) for i in range(scope.depth)]

    def write(self, scope: Scope, values: Sequence[Any]) -> Changes:
        old = scope.get(self.key)
        count = 1 if isinstance(old, int) else len(old)
        places = {value: i + self.first for i, value in enumerate(values) if value is not None}
        marked = [value for value in values if value is not None]
        if sorted(marked) != list(range(count)):
            raise Unsayable(dotted(self.key), "refers to layers by index, and each of them must be there exactly once")
        numbers = [places[k] for k in range(count)]
        return {path(self.key): numbers[0] if isinstance(old, int) else numbers}


@dataclass(frozen=True)
class Parts(Form):
    """Several lists of layer numbers that divide the layers among kinds.

    Attributes:
        parts: Kind -> key of the list of its layers.
        first: The number of the first layer.
    """

    parts: Mapping[Any, Key]
    first: int = 0

    @property
    def keys(self) -> tuple[Key, ...]:
        return tuple(self.parts.values())

    def read(self, scope: Scope) -> Sequence[Any] | None:
        if any(scope.get(key) is None for key in self.keys):
            return None
        kinds = {n - self.first: kind for kind, key in self.parts.items() for n in integers(scope.get(key), key)}
        if not set(range(scope.depth)) <= set(kinds):
            raise Unsayable(dotted(self.keys[0]), "and its like leave a layer out")
        return [kinds[i] for i in range(scope.depth)]

    def write(self, scope: Scope, values: Sequence[Any]) -> Changes:
        two_kinds(values, tuple(self.parts), self.keys[0])
        return {
            path(key): [i + self.first for i, value in enumerate(values) if value == kind]
            for kind, key in self.parts.items()
        }
