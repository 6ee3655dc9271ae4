"""YAML values that know where they stand, so that every complaint names a recipe path and a line.

`yaml.safe_load` semantics without its silent spots: duplicate keys are refused, anchors are bounded, and only plain
data comes out. Nothing here knows what a recipe is.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import partial
from typing import NoReturn

import yaml

from .errors import RecipeError, nearest

MAX_BYTES = 1_000_000
MAX_DEPTH = 32
MAX_WRITTEN = 20_000  # values as they are written: reading one takes a good 20 microseconds
MAX_NODES = 200_000  # counted after anchors are expanded: a billion laughs end here
MAX_SCALAR = 400  # characters of a value that is no text: YAML's numbers to the base 60 take quadratic time


@dataclass(frozen=True)
class Located:
    """One YAML value with its place.

    Attributes:
        value: A scalar, a ``tuple[Located, ...]`` or a ``dict[str, Located]``.
        path: The recipe path, like ``slices[2].sources[0].layer_range``.
        line: 1-based line in the file; 0 for a value that did not come from a file.
        file: What the file is called in messages.
    """

    value: object
    path: str = ""
    line: int = 0
    file: str = "recipe"

    @property
    def where(self) -> str:
        line = f" (line {self.line})" if self.line else ""
        return f"{self.path or self.file}{line}"

    def fail(self, message: str, *, expected=None, got=None, hint=None) -> NoReturn:
        """Raise a RecipeError at this place."""
        if got is None:
            got = self.shown()
        raise RecipeError(message, where=self.where, expected=expected, got=got, hint=hint)

    def shown(self) -> str:
        """The value as a message shows it: as YAML would, short, on one line."""
        text = ""
        for piece in self._flow():
            text += piece
            if len(text) > 80:
                return text[:77] + "..."
        return text

    def _flow(self) -> Iterator[str]:
        """Pieces of the value in YAML's flow style: a large value is never rendered whole."""
        if isinstance(self.value, dict | tuple):
            keyed = isinstance(self.value, dict)
            yield "{" if keyed else "["
            for i, key in enumerate(self.value):
                yield ", " if i else ""
                if keyed:
                    yield f"{key[:100]}: "
                yield from (self.value[key] if keyed else key)._flow()
            yield "}" if keyed else "]"
        elif isinstance(self.value, str):
            yield repr(self.value[:100])
        else:
            yield "nothing" if self.value is None else str(self.value).lower()

    def plain(self) -> object:
        """The value as plain Python data, places dropped."""
        if isinstance(self.value, dict):
            return {k: v.plain() for k, v in self.value.items()}
        if isinstance(self.value, tuple):
            return [v.plain() for v in self.value]
        return self.value

    def mapping(self, allowed: Collection[str] = (), what: str = "a mapping") -> dict[str, Located]:
        """This value as a mapping whose keys are all in ``allowed`` (empty: any)."""
        keys = ", ".join(sorted(allowed))
        if not isinstance(self.value, dict):
            self.fail(f"must be {what}", expected=f"key: value pairs{keys and f', with the keys {keys}'}")
        for key, item in self.value.items():
            if allowed and key not in allowed:
                item.fail(f"unknown key {key!r}", expected=keys, got=key, hint=nearest(key, allowed))
        return self.value

    def sequence(self, what: str = "a list", expected: str = "a non-empty list") -> tuple[Located, ...]:
        """This value as a non-empty list."""
        if not isinstance(self.value, tuple) or not self.value:
            self.fail(f"must be {what}", expected=expected)
        return self.value

    def string(self, what: str) -> str:
        if not isinstance(self.value, str) or not self.value.strip():
            self.fail("wrong value", expected=what)
        return self.value

    def integer(self, minimum: int = 0) -> int:
        if isinstance(self.value, bool) or not isinstance(self.value, int) or self.value < minimum:
            self.fail("wrong value", expected=f"a whole number of at least {minimum}")
        return self.value

    def choice(self, known: Collection[str], what: str) -> str:
        if not isinstance(self.value, str) or self.value not in known:
            self.fail(f"unknown {what}", expected=" | ".join(sorted(known)), hint=nearest(str(self.value), known))
        return self.value


def locate(value: object, path: str = "") -> Located:
    """Plain data as a `Located` tree that stands in no file."""
    if isinstance(value, dict):
        return Located({str(k): locate(v, _under(path, k)) for k, v in value.items()}, path)
    if isinstance(value, list | tuple):
        return Located(tuple(locate(v, f"{path}[{i}]") for i, v in enumerate(value)), path)
    return Located(value, path)


def _under(path: str, key: object) -> str:
    return f"{path}.{key}" if path else str(key)


def parse(text: str, file: str = "recipe") -> Located:
    """YAML text of one document -> `Located` tree.

    Raises:
        RecipeError: as `parse_documents`; also a second document.
    """
    root, *more = parse_documents(text, file)
    if more:
        where = f"{file} (line {more[0].line})"
        raise RecipeError("a second document", where=where, expected="one YAML document", got=more[0].shown())
    return root


def parse_documents(text: str, file: str = "recipe") -> tuple[Located, ...]:
    """YAML text -> one `Located` tree for each document in it that is not empty; at least one.

    Raises:
        RecipeError: not YAML, nothing in it, a duplicate key, a key that is no string, too large, too deep, or anchors
            that expand beyond bounds.
    """
    if len(text) > MAX_BYTES:
        raise RecipeError("the recipe is too large", where=file, expected=f"at most {MAX_BYTES} bytes")
    try:
        nodes = [node for node in yaml.compose_all(text, partial(_Loader, file=file)) if not _empty(node)]
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{file} (line {mark.line + 1})" if mark else file
        detail = (getattr(error, "problem", None) or str(error)).splitlines()[0]
        hint = "indent with spaces, not tabs" if r"'\t'" in detail else None
        raise RecipeError("not valid YAML", where=where, expected="YAML documents", got=detail, hint=hint) from None
    except RecursionError:
        raise RecipeError("the recipe is nested too deeply", where=file, expected=f"depth {MAX_DEPTH}") from None
    if not nodes:
        raise RecipeError("there is nothing in it", where=file, hint="deus-merge --help and recipes/ have examples")
    reader = _Reader(file)
    return tuple(reader.read(node, "", 0) for node in nodes)


_TAG = "tag:yaml.org,2002:"
_PLAIN = (f"{_TAG}seq", f"{_TAG}map")


def _empty(node: yaml.Node) -> bool:
    """What stands between two separators, or behind the last, when nothing does."""
    return isinstance(node, yaml.ScalarNode) and node.value == "" and node.style is None


def _tag(node: yaml.Node) -> str:
    """A node's tag as it is written."""
    return f"!!{node.tag.removeprefix(_TAG)}" if node.tag.startswith(_TAG) else node.tag


class _Loader(yaml.SafeLoader):
    """Stops at the bounds while it reads: PyYAML's time for a value grows with its depth."""

    def __init__(self, text: str, file: str):
        super().__init__(text)
        self.file = file
        self.depth = self.written = 0

    def compose_node(self, parent: yaml.Node | None, index: object) -> yaml.Node:
        self.depth += 1
        self.written += 1
        place = Located(None, line=self.line + 1, file=self.file)
        if self.depth > MAX_DEPTH + 1:
            place.fail("the recipe is nested too deeply", expected=f"at most {MAX_DEPTH} levels", got="more")
        if self.written > MAX_WRITTEN:
            place.fail("the recipe is too large", expected=f"at most {MAX_WRITTEN} values", got="more")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


class _Reader:
    def __init__(self, file: str):
        self.file = file
        self.nodes = 0
        self.scalars = yaml.constructor.SafeConstructor()

    def read(self, node: yaml.Node, path: str, depth: int) -> Located:
        line = node.start_mark.line + 1
        place = Located(None, path, line, self.file)
        self.nodes += 1
        if depth > MAX_DEPTH:
            place.fail("the recipe is nested too deeply", expected=f"at most {MAX_DEPTH} levels", got="more")
        if self.nodes > MAX_NODES:
            place.fail("the recipe's anchors make it too large", expected=f"at most {MAX_NODES} values", got="more")
        if isinstance(node, yaml.ScalarNode):
            return Located(self._scalar(node, place), path, line, self.file)
        if node.tag not in _PLAIN:
            place.fail("a tag is not supported", expected="plain lists and mappings", got=_tag(node))
        if isinstance(node, yaml.MappingNode):
            return Located(self._mapping(node, path, depth), path, line, self.file)
        items = tuple(self.read(child, f"{path}[{i}]", depth + 1) for i, child in enumerate(node.value))
        return Located(items, path, line, self.file)

    def _scalar(self, node: yaml.ScalarNode, place: Located) -> object:
        if node.tag == f"{_TAG}timestamp":
            return node.value  # a recipe has no use for dates but as text
        try:
            short = node.tag == f"{_TAG}str" or len(node.value) <= MAX_SCALAR
            value = self.scalars.construct_object(node) if short else NotImplemented
        except (yaml.YAMLError, ValueError, LookupError):
            value = NotImplemented
        if not isinstance(value, str | int | float | None) or (isinstance(value, int) and value.bit_length() > 1000):
            got = f"{_tag(node)} {node.value[:40]}"
            place.fail("not a plain value", expected="text, a number or true/false", got=got)
        return value

    def _mapping(self, node: yaml.MappingNode, path: str, depth: int) -> dict[str, Located]:
        items: dict[str, Located] = {}
        for key_node, value_node in node.value:
            key = key_node.value
            here = Located(None, path, key_node.start_mark.line + 1, self.file)
            if not isinstance(key, str):
                here.fail("a key must be text", expected="key: value", got=type(key).__name__)
            if key_node.tag == "tag:yaml.org,2002:merge":
                here.fail("merge keys (<<) are not supported", hint="write the keys out", got="<<")
            if key in items:
                here.fail(f"key {key!r} stands twice", expected="each key once", got=key)
            items[key] = self.read(value_node, _under(path, key), depth + 1)
        return items
