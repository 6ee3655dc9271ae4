"""The forms that many families use: lists, intervals, counts, defaults."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from .base import DROPPED, Changes, Form, Key, Scope, Unsayable, dotted, path
from .values import integers, known_word


@dataclass(frozen=True)
class Listed(Form):
    """A list with one entry a layer.

    Attributes:
        key: The list's key.
        names: What its entries mean, where the fact has other words for them.
        tail: Whether it may be longer than the depth: prediction layers stand behind the others.
    """

    key: Key
    names: Mapping[Any, Any] | None = None
    tail: bool = False
    explicit: ClassVar[bool] = True

    @property
    def keys(self) -> tuple[Key, ...]:
        return (self.key,)

    def read(self, scope: Scope) -> Sequence[Any] | None:
        value = scope.get(self.key)
        if not isinstance(value, list) or not value:
            return None
        if len(value) < scope.depth or (len(value) > scope.depth and not self.tail):
            raise Unsayable(dotted(self.key), f"has {len(value)} entries for {scope.depth} layers")
        return [self._meaning(entry) for entry in value[: scope.depth]]

    def _meaning(self, entry: Any) -> Any:
        if self.names is None:
            return entry
        if entry not in self.names:
            raise Unsayable(dotted(self.key), f"has an unknown entry: {entry!r}")
        return self.names[entry]

    def write(self, scope: Scope, values: Sequence[Any]) -> Changes:
        entries = list(values)
        if self.names is not None:
            words = {meaning: entry for entry, meaning in self.names.items()}
            entries = [known_word(words, value, dotted(self.key)) for value in values]
        old = scope.get(self.key)
        tail = old[scope.depth :] if isinstance(old, list) else []
        return {path(self.key): entries + tail}


@dataclass(frozen=True)
class Every(Form):
    """Every k-th layer is of another kind: layer i where ``(i + 1 + shift) % k == 0``.

    Attributes:
        key: The key that holds k; None where transformers knows only the default.
        hit, miss: The values of every k-th layer, and of the others.
        default: k where the key is missing; None: a config without it says nothing.
        shift: Where counting begins; -1: layer 0 is the first one that is hit.
    """

    key: Key | None
    hit: Any
    miss: Any
    default: int | None = None
    shift: int = 0

    @property
    def keys(self) -> tuple[Key, ...]:
        return (self.key,) if self.key is not None else ()

    def _values(self, k: int, depth: int) -> list[Any]:
        return [self.hit if (i + 1 + self.shift) % k == 0 else self.miss for i in range(depth)]

    def _period(self, scope: Scope) -> int | None:
        value = None if self.key is None else scope.get(self.key)
        if value is None or isinstance(value, bool):
            return self.default
        return value if isinstance(value, int) and value > 0 else None

    def read(self, scope: Scope) -> Sequence[Any] | None:
        k = self._period(scope)
        return None if k is None else self._values(k, scope.depth)

    def write(self, scope: Scope, values: Sequence[Any]) -> Changes:
        k, name = self._period(scope), dotted(self.key or "the default interval")
        if k is not None and self._values(k, len(values)) == list(values):
            return {}
        if self.key is not None and self.present(scope):
            for other in range(1, len(values) + 2):
                if self._values(other, len(values)) == list(values):
                    return {path(self.key): other}
        raise Unsayable(name, "cannot say which layers of the output are of which kind")


@dataclass(frozen=True)
class Period(Form):
    """Layers ``i % period == offset`` are of another kind.

    Attributes:
        period, offset: The keys.
        hit, miss: The values of these layers and of the others.
        defaults: Period and offset where a key is missing.
    """

    period: Key
    offset: Key
    hit: Any
    miss: Any
    defaults: tuple[int, int]

    @property
    def keys(self) -> tuple[Key, ...]:
        return (self.period, self.offset)

    def read(self, scope: Scope) -> Sequence[Any] | None:
        period, offset = scope.get(self.period, self.defaults[0]), scope.get(self.offset, self.defaults[1])
        integers([period, offset], self.period)
        if period < 1:
            raise Unsayable(dotted(self.period), "is not positive")
        return [self.hit if i % period == offset else self.miss for i in range(scope.depth)]

    def write(self, scope: Scope, values: Sequence[Any]) -> Changes:
        now = Scope(scope.section, scope.root, len(values))
        if self.read(now) == list(values):
            return {}
        for period in range(1, len(values) + 2):
            for offset in range(period):
                if [self.hit if i % period == offset else self.miss for i in range(len(values))] == list(values):
                    return {path(self.period): period, path(self.offset): offset}
        raise Unsayable(dotted(self.period), "cannot say which layers of the output are of which kind")


@dataclass(frozen=True)
class Count(Form):
    """The first k layers are of one kind, the others of another one.

    Attributes:
        key: The key that holds k.
        head, rest: The values of the first layers and of the others.
        default: k where the key is missing; None: a config without it says nothing.
        every: A key that holds m: after the first layers only every m-th (``i % m == 0``) is of the other kind.
        when: Whether the form applies to a config; where it does not, all layers are of the first kind.
    """

    key: Key | None
    head: Any
    rest: Any
    default: int | None = None
    every: Key | None = None
    when: Callable[[Scope], bool] | None = None

    @property
    def keys(self) -> tuple[Key, ...]:
        return tuple(key for key in (self.key, self.every) if key is not None)

    def _count(self, scope: Scope) -> int | None:
        count = self.default if self.key is None else scope.get(self.key, self.default)
        return None if count is None else integers([count], self.key or "")[0]

    def _values(self, count: int, every: int, depth: int) -> list[Any]:
        return [self.rest if i >= count and i % every == 0 else self.head for i in range(depth)]

    def read(self, scope: Scope) -> Sequence[Any] | None:
        if self.when is not None and not self.when(scope):
            return [self.head] * scope.depth
        count, every = self._count(scope), 1 if self.every is None else scope.get(self.every, 1)
        if not isinstance(every, int) or every < 1:
            return None
        return None if count is None else self._values(count, every, scope.depth)

    def write(self, scope: Scope, values: Sequence[Any]) -> Changes:
        if self.read(Scope(scope.section, scope.root, len(values))) == list(values):
            return {}
        count = next((i for i, value in enumerate(values) if value != self.head), len(values))
        able = self.key is not None and self._values(count, 1, len(values)) == list(values)
        if not able or (self.when is not None and not self.when(scope)):
            raise Unsayable(dotted(self.key or "the default"), "can only count the first layers of the output")
        reset = {path(self.every): 1} if self.every is not None and scope.get(self.every, 1) != 1 else {}
        return {path(self.key or ""): count, **reset}


@dataclass(frozen=True)
class Implied(Form):
    """Values that transformers calculates where a config has no list.

    Attributes:
        values: The config -> one value a layer.
        read_keys: The keys that say nothing else than this, and go when a list takes their place.
        other_keys: The keys that say something else, too.
    """

    values: Callable[[Scope], Sequence[Any]]
    read_keys: tuple[Key, ...] = ()
    other_keys: tuple[Key, ...] = ()

    @property
    def keys(self) -> tuple[Key, ...]:
        return (*self.read_keys, *self.other_keys)

    def read(self, scope: Scope) -> Sequence[Any] | None:
        return self.values(scope)

    def write(self, scope: Scope, values: Sequence[Any]) -> Changes:
        if list(self.values(Scope(scope.section, scope.root, len(values)))) == list(values):
            return {}
        raise Unsayable(dotted(self.keys[0]) if self.keys else "the default", "cannot say the layers of the output")

    def dropped(self, scope: Scope) -> Changes:
        return {path(key): DROPPED for key in self.read_keys if scope.get(key) is not None}


@dataclass(frozen=True)
class Given(Form):
    """Another form, where the config has one of its keys.

    Attributes:
        form: The form.
    """

    form: Form

    @property
    def keys(self) -> tuple[Key, ...]:
        return self.form.keys

    def read(self, scope: Scope) -> Sequence[Any] | None:
        return self.form.read(scope) if self.form.present(scope) else None

    def write(self, scope: Scope, values: Sequence[Any]) -> Changes:
        return self.form.write(scope, values)
