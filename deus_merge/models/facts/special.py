"""The forms that only few families use."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from .base import Changes, Form, Key, Pinned, Scope, Unsayable, Use, dotted, path
from .forms import integers, known_word


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
