"""What a form is: one way in which a config.json says something about each layer; and rules, which are lists of forms.

A *fact* is a named property of a layer, like its ``layer_types``. A *form* reads the values of all layers from a config
and writes those of other layers back. A *rule* names a fact and its forms, the one that transformers prefers first.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

from ..config_json import Config, value_at

#: a key of a section of config.json, or the keys that lead to a value in a mapping there
Key = str | tuple[str, ...]
#: values by the keys that lead to them from the section; `DROPPED` removes a key
Changes = dict[tuple[str, ...], Any]


class _Dropped:
    def __repr__(self) -> str:
        return "DROPPED"


DROPPED = _Dropped()


class Unsayable(Exception):
    """A form cannot say these values, or its own value makes no sense.

    Args:
        key: The key of the config.
        reason: Why, as the end of a sentence about the key.
    """

    def __init__(self, key: str, reason: str):
        super().__init__(f"{key} {reason}")
        self.key, self.reason = key, reason


@dataclass(frozen=True)
class Pinned:
    """A fact that ties a layer to its number, and perhaps to the depth: the layer computes something else elsewhere.

    Attributes:
        index: The layer's number.
        depth: The number of layers; None where only the layer's own number matters.
        reason: Why, as the end of a sentence about the key of the config; it does not distinguish facts.
    """

    index: int
    depth: int | None
    reason: str = field(compare=False, default="")

    def __str__(self) -> str:
        return f"number {self.index}" + (f" of {self.depth}" if self.depth is not None else "")


class Use(NamedTuple):
    """A layer's kind, and the number of the layer whose result it uses; None where no two layers use one result."""

    kind: str
    layer: int | None


@dataclass(frozen=True)
class Scope:
    """Where the values of a stack of layers stand.

    Attributes:
        section: The mapping of config.json that holds the stack's depth.
        root: The whole config.json.
        depth: The number of layers.
    """

    section: Config
    root: Config
    depth: int

    def get(self, key: Key, default: Any = None) -> Any:
        """The value under a key of the section; the default where it is missing or null."""
        value = value_at(self.section, path(key))
        return default if value is None else value


def path(key: Key) -> tuple[str, ...]:
    """The keys that lead to a value from the section."""
    return (key,) if isinstance(key, str) else key


def dotted(key: Key) -> str:
    """The key as messages name it."""
    return ".".join(path(key))


@dataclass(frozen=True, kw_only=True)
class Form(ABC):
    """One way in which a config says a fact of each layer.

    Attributes:
        mirror: Whether transformers ignores it: it is kept true where it can be, and never read.
    """

    mirror: bool = False

    #: whether any values can be said, so that a config that lacks this form may be given it
    explicit: ClassVar[bool] = False

    @property
    @abstractmethod
    def keys(self) -> tuple[Key, ...]:
        """The keys that the form reads."""

    @abstractmethod
    def read(self, scope: Scope) -> Sequence[Any] | None:
        """One value a layer; None where the config does not use this form.

        Raises:
            Unsayable: the value under the form's key makes no sense.
        """

    @abstractmethod
    def write(self, scope: Scope, values: Sequence[Any]) -> Changes:
        """The changes to the section after which `read` gives these values.

        Args:
            scope: The config of other layers, whose style is kept.
            values: One a layer of the output.

        Raises:
            Unsayable: the form cannot say them.
        """

    def present(self, scope: Scope) -> bool:
        """Whether the config has one of the form's keys."""
        return any(scope.get(key) is not None for key in self.keys)

    def agrees(self, scope: Scope, values: Sequence[Any]) -> bool:
        """Whether the form says these values; one that never did may stay as it is."""
        try:
            return list(self.read(scope) or ()) == list(values)
        except Unsayable:
            return False

    def dropped(self, scope: Scope) -> Changes:
        """The changes that remove the form from the config."""
        return {path(key): DROPPED for key in self.keys if scope.get(key) is not None}


@dataclass(frozen=True)
class Rule:
    """A fact, and the forms in which a config may say it.

    Attributes:
        fact: Its name: that of the key that says it best.
        forms: Those that transformers reads, the one that wins first; then mirrors.
        last: The value that transformers gives the last layer whatever the config says.
    """

    fact: str
    forms: tuple[Form, ...]
    last: Any = None

    @property
    def keys(self) -> tuple[Key, ...]:
        """The keys that its forms read."""
        return tuple(dict.fromkeys(key for form in self.forms for key in form.keys))

    def expand(self, scope: Scope) -> list[Any] | None:
        """The fact's value for each layer; None where the config does not speak of it.

        Raises:
            Unsayable: a value makes no sense.
        """
        for form in self.forms:
            values = None if form.mirror else form.read(scope)
            if values is not None:
                return [*values[:-1], self.last] if self.last is not None else list(values)
        return None

    def contract(self, scope: Scope, values: Sequence[Any]) -> Changes:
        """The changes to a config after which the fact has these values.

        The forms that are there are kept where they can say the values. If the one that counts cannot, an explicit form
        takes its place. Others that agreed with it must still do so, or they go.

        Raises:
            Unsayable: no form can say them.
        """
        if self.last is not None and values[-1] != self.last:
            raise Unsayable(self.fact, f"is always {self.last!r} for the last layer, whatever it was made for")
        kept = next((form for form in self.forms if not form.mirror and form.read(scope) is not None), None)
        if kept is None:
            raise Unsayable(self.fact, "is missing")
        try:
            changes = kept.write(scope, values)
        except Unsayable as failure:
            kept = next((form for form in self.forms if form.explicit and not form.mirror and form is not kept), None)
            if kept is None:
                raise
            try:
                changes = kept.write(scope, values)
            except Unsayable:
                raise failure from None
        own = self.expand(scope)
        for form in self.forms:
            if form is not kept and form.present(scope) and form.agrees(scope, own or ()):
                try:
                    others = form.write(scope, values)
                except Unsayable:
                    others = form.dropped(scope)
                changes = {k: v for k, v in others.items() if k not in map(path, kept.keys)} | changes
        return changes


def changed(section: Config, changes: Mapping[tuple[str, ...], Any]) -> dict[str, Any]:
    """A copy of a section with changes; the order of keys is kept, new ones come last."""
    result = dict(section)
    for (key, *rest), value in changes.items():
        if rest:
            result[key] = changed(result.get(key) or {}, {tuple(rest): value})
        elif value is DROPPED:
            result.pop(key, None)
        else:
            result[key] = value
    return result
