"""The forms that only few families use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from .base import Changes, Form, Key, Scope, Unsayable, dotted, path
from .values import integers, known_word


@dataclass(frozen=True)
class SparseStep(Form):
    """Experts in every ``step``-th layer that is not in a list of layers without (`mlp_only_layers`)."""

    only: Key = "mlp_only_layers"
    step: Key = "decoder_sparse_step"
    default: Sequence[int] = ()
    explicit: ClassVar[bool] = True

    @property
    def keys(self) -> tuple[Key, ...]:
        return (self.only, self.step)

    def read(self, scope: Scope) -> Sequence[Any] | None:
        only, step = integers(scope.get(self.only, list(self.default)), self.only), scope.get(self.step, 1)
        if integers([step], self.step)[0] < 1:
            raise Unsayable(dotted(self.step), "is not positive")
        return ["sparse" if i not in only and (i + 1) % step == 0 else "dense" for i in range(scope.depth)]

    def write(self, scope: Scope, values: Sequence[Any]) -> Changes:
        if self.read(Scope(scope.section, scope.root, len(values))) == list(values):
            return {}
        step = scope.get(self.step, 1)
        if any(value == "sparse" and (i + 1) % step for i, value in enumerate(values)):
            step = 1
        dense = [i for i, value in enumerate(values) if value == "dense" and (i + 1) % step == 0]
        changes: Changes = {path(self.only): dense}
        return changes if step == scope.get(self.step, 1) else changes | {path(self.step): step}


@dataclass(frozen=True)
class Span(Form):
    """Every ``interval``-th layer from ``start`` to ``end`` is of another kind; an end of -1 is the last layer."""

    start: Key = "moe_layer_start_index"
    end: Key = "moe_layer_end_index"
    interval: Key = "moe_layer_interval"
    inside: Any = "sparse"
    outside: Any = "dense"
    defaults: tuple[int, int, int] = (1, -1, 1)

    @property
    def keys(self) -> tuple[Key, ...]:
        return (self.start, self.end, self.interval)

    def _values(self, start: int, end: int, interval: int, depth: int) -> list[Any]:
        last = depth - 1 if end == -1 else end
        chosen = (start <= i <= last and (i + 1) % interval == 0 for i in range(depth))
        return [self.inside if inside else self.outside for inside in chosen]

    def _settings(self, scope: Scope) -> list[int]:
        found = [scope.get(key, default) for key, default in zip(self.keys, self.defaults, strict=True)]
        for key, value in zip(self.keys, found, strict=True):
            integers([value], key)
        return found

    def read(self, scope: Scope) -> Sequence[Any] | None:
        start, end, interval = self._settings(scope)
        return self._values(start, end, interval, scope.depth) if interval > 0 else None

    def write(self, scope: Scope, values: Sequence[Any]) -> Changes:
        start, end, interval = self._settings(scope)
        if self._values(start, end, interval, len(values)) == list(values):
            return {}
        inside = [i for i, value in enumerate(values) if value == self.inside] or [len(values)]
        last = -1 if inside[-1] == len(values) - 1 else inside[-1]
        for step in (interval, *range(1, len(values) + 1)):
            if self._values(inside[0], last, step, len(values)) == list(values):
                numbers = zip(self.keys, (inside[0], last, step), (start, end, interval), strict=True)
                return {path(key): new for key, new, old in numbers if new != old}
        raise Unsayable(dotted(self.start), "and its like cannot say which layers of the output have experts")


@dataclass(frozen=True)
class Letters(Form):
    """A string with one letter a layer.

    Attributes:
        key: The string's key.
        letters: What the letters mean.
    """

    key: Key
    letters: Mapping[str, Any]
    explicit: ClassVar[bool] = True

    @property
    def keys(self) -> tuple[Key, ...]:
        return (self.key,)

    def read(self, scope: Scope) -> Sequence[Any] | None:
        text = scope.get(self.key)
        if isinstance(text, list) and self.letters is not None:  # some publish a list of the meanings
            return text if len(text) == scope.depth else None
        if not isinstance(text, str) or not text:
            return None
        if len(text) != scope.depth or set(text) - set(self.letters):
            raise Unsayable(dotted(self.key), f"is not one of the letters {' '.join(self.letters)} for each layer")
        return [self.letters[letter] for letter in text]

    def write(self, scope: Scope, values: Sequence[Any]) -> Changes:
        if isinstance(scope.get(self.key), list):
            return {path(self.key): list(values)}
        words = {meaning: letter for letter, meaning in self.letters.items()}
        return {path(self.key): "".join(known_word(words, value, dotted(self.key)) for value in values)}


@dataclass(frozen=True)
class Cycle(Form):
    """A short list, or a string of letters, that is repeated until all layers have an entry.

    Attributes:
        key: Its key.
        default: The list where the key is missing; None: a config without it says nothing.
        letters: What the entries mean; None: they are the values themselves.
    """

    key: Key
    default: Sequence[Any] | None = None
    letters: Mapping[Any, Any] | None = None

    @property
    def keys(self) -> tuple[Key, ...]:
        return (self.key,)

    def read(self, scope: Scope) -> Sequence[Any] | None:
        cycle = scope.get(self.key, self.default)
        if not isinstance(cycle, (list, tuple, str)) or not cycle:
            return None
        meaning = self.letters or {entry: entry for entry in cycle}
        if set(cycle) - set(meaning):
            raise Unsayable(dotted(self.key), f"has an unknown entry: {cycle!r}")
        return [meaning[cycle[i % len(cycle)]] for i in range(scope.depth)]

    def write(self, scope: Scope, values: Sequence[Any]) -> Changes:
        if self.read(Scope(scope.section, scope.root, len(values))) == list(values):
            return {}
        words = {meaning: entry for entry, meaning in self.letters.items()} if self.letters else None
        entries = [known_word(words, value, dotted(self.key)) if words else value for value in values]
        return {path(self.key): "".join(entries) if isinstance(scope.get(self.key), str) else entries}


@dataclass(frozen=True)
class ByNumber(Form):
    """A mapping from layer numbers, as strings, to settings of these layers."""

    key: Key
    explicit: ClassVar[bool] = True

    @property
    def keys(self) -> tuple[Key, ...]:
        return (self.key,)

    def read(self, scope: Scope) -> Sequence[Any] | None:
        table = scope.get(self.key)
        if not isinstance(table, Mapping):
            return None
        if not all(str(number).isdecimal() for number in table):
            raise Unsayable(dotted(self.key), "has keys that are no layer numbers")
        settings = {int(number): value for number, value in table.items()}
        return [settings.get(i, {}) for i in range(scope.depth)]

    def write(self, scope: Scope, values: Sequence[Any]) -> Changes:
        padded = any(len(str(key)) > 1 and str(key)[0] == "0" for key in scope.get(self.key, {}))
        width = len(str(len(values) - 1)) if padded else 0
        table = {str(i).zfill(width): value for i, value in enumerate(values) if value not in ({}, None)}
        return {path(self.key): table}


@dataclass(frozen=True)
class Groups(Form):
    """GPT-Neo's list of pairs: a list of kinds, and how often it is repeated."""

    key: Key
    default: Sequence[Any] | None = None
    explicit: ClassVar[bool] = True

    @property
    def keys(self) -> tuple[Key, ...]:
        return (self.key,)

    def read(self, scope: Scope) -> Sequence[Any] | None:
        groups = scope.get(self.key, self.default)
        if groups is None:
            return None
        try:
            kinds = [kind for cycle, count in groups for _ in range(count) for kind in cycle]
        except (TypeError, ValueError):
            raise Unsayable(dotted(self.key), "is not a list of kinds and counts") from None
        if len(kinds) != scope.depth:
            raise Unsayable(dotted(self.key), f"has {len(kinds)} entries for {scope.depth} layers")
        return kinds

    def write(self, scope: Scope, values: Sequence[Any]) -> Changes:
        return {path(self.key): [[[value], 1] for value in values]}
