"""YAML values with their recipe path and line, so that every error message can name the place.

The values are those of `yaml.safe_load`, with stricter reading: duplicate keys are refused, the expansion of anchors is
bounded, and only plain data is accepted. This module does not know what a recipe is.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

import yaml

from .errors import RecipeError, nearest

MAX_BYTES = 1_000_000
MAX_DEPTH = 32
MAX_WRITTEN = 20_000  # values in the text, before anchors are expanded: reading one takes about 20 microseconds
MAX_NODES = 200_000  # values after anchors are expanded ("billion laughs")
MAX_SCALAR = 400  # characters of a value that is not text: reading YAML's base 60 numbers takes quadratic time

Scalar = bool | int | float | str | None
#: YAML data without places
Plain = bool | int | float | str | list["Plain"] | dict[str, "Plain"] | None


@dataclass(frozen=True)
class Located:
    """One YAML value with its place.

    Attributes:
        value: A scalar, the items of a list, or the values of a mapping by key.
        path: The recipe path, like ``slices[2].sources[0].layer_range``.
        line: 1-based line in the file; 0 for a value that was not read from a file.
        file: The file's name in messages.
    """

    value: Scalar | tuple[Located, ...] | dict[str, Located]
    path: str = ""
    line: int = 0
    file: str = "recipe"

    @property
    def where(self) -> str:
        line = f" (line {self.line})" if self.line else ""
        return f"{self.path or self.file}{line}"

    def fail(self, message: str, *, expected: object = None, got: object = None, hint: str | None = None) -> NoReturn:
        """Raise a RecipeError at this place; ``got`` is this value unless given."""
        if got is None:
            got = self.shown()
        raise RecipeError(message, where=self.where, expected=expected, got=got, hint=hint)

    def shown(self) -> str:
        """The value as messages show it: YAML on one line, cut to 80 characters."""
        text = ""
        for part in self._flow():
            text += part
            if len(text) > 80:
                return text[:77] + "..."
        return text

    def _flow(self) -> Iterator[str]:
        """The value in YAML's flow style, part by part, so that a large value is not rendered whole."""
        if isinstance(self.value, dict):
            yield "{"
            for i, (key, item) in enumerate(self.value.items()):
                yield f"{', ' if i else ''}{key[:100]}: "
                yield from item._flow()
            yield "}"
        elif isinstance(self.value, tuple):
            yield "["
            for i, item in enumerate(self.value):
                yield ", " if i else ""
                yield from item._flow()
            yield "]"
        elif isinstance(self.value, str):
            yield repr(self.value[:100])
        else:
            yield "nothing" if self.value is None else str(self.value).lower()

    def plain(self) -> Plain:
        """The value as plain Python data, without places."""
        if isinstance(self.value, dict):
            return {k: v.plain() for k, v in self.value.items()}
        if isinstance(self.value, tuple):
            return [v.plain() for v in self.value]
        return self.value

    def child(self, key: str) -> Located:
        """The value of a key, of a mapping that is known to have it."""
        assert isinstance(self.value, dict)
        return self.value[key]

    def mapping(self, allowed: Collection[str] = (), kind: str = "a mapping") -> dict[str, Located]:
        """This value as a mapping.

        Args:
            allowed: The keys it may have; empty for any.
            kind: The kind of value, for messages: ``"a slice"``.

        Raises:
            RecipeError: not a mapping, or a key that is not allowed.
        """
        keys = ", ".join(sorted(allowed))
        if not isinstance(self.value, dict):
            self.fail(f"must be {kind}", expected=f"key: value pairs{keys and f', with the keys {keys}'}")
        for key, item in self.value.items():
            if allowed and key not in allowed:
                item.fail(f"unknown key {key!r}", expected=keys, got=key, hint=nearest(key, allowed))
        return self.value

    def sequence(self, kind: str = "a list", expected: str = "a non-empty list") -> tuple[Located, ...]:
        """This value as a non-empty list; raises RecipeError otherwise."""
        if not isinstance(self.value, tuple) or not self.value:
            self.fail(f"must be {kind}", expected=expected)
        return self.value

    def string(self, expected: str) -> str:
        """This value as text that is not blank; raises RecipeError otherwise."""
        if not isinstance(self.value, str) or not self.value.strip():
            self.fail("wrong value", expected=expected)
        return self.value

    def integer(self, minimum: int = 0) -> int:
        """This value as an integer of at least ``minimum``; raises RecipeError otherwise."""
        if isinstance(self.value, bool) or not isinstance(self.value, int) or self.value < minimum:
            self.fail("wrong value", expected=f"a whole number of at least {minimum}")
        return self.value

    def choice(self, known: Collection[str], kind: str) -> str:
        """This value as one of the ``known`` words; raises RecipeError otherwise, with the nearest of them."""
        if not isinstance(self.value, str) or self.value not in known:
            self.fail(f"unknown {kind}", expected=" | ".join(sorted(known)), hint=nearest(str(self.value), known))
        return self.value


def locate(value: object, path: str = "") -> Located:
    """Plain data (``Plain``, also with tuples for lists) as a `Located` tree without a file.

    Raises:
        RecipeError: a value that YAML cannot hold.
    """
    if isinstance(value, dict):
        return Located({str(k): locate(v, _under(path, k)) for k, v in value.items()}, path)
    if isinstance(value, list | tuple):
        return Located(tuple(locate(v, f"{path}[{i}]") for i, v in enumerate(value)), path)
    if not isinstance(value, bool | int | float | str | None):
        Located(None, path).fail("not a plain value", expected="text, a number or true/false", got=type(value).__name__)
    return Located(value, path)


def _under(path: str, key: object) -> str:
    return f"{path}.{key}" if path else str(key)


def parse(text: str, file: str = "recipe") -> Located:
    """The tree of a YAML text with one document.

    Raises:
        RecipeError: as `parse_documents`, and for a second document.
    """
    root, *more = parse_documents(text, file)
    if more:
        where = f"{file} (line {more[0].line})"
        raise RecipeError("a second document", where=where, expected="one YAML document", got=more[0].shown())
    return root


def parse_documents(text: str, file: str = "recipe") -> tuple[Located, ...]:
    """The trees of a YAML text, one for each document that is not empty; at least one.

    Raises:
        RecipeError: not YAML, empty, a duplicate key, a key that is not text, too large, too deep, or anchors that
            expand beyond the bounds.
    """
    if len(text) > MAX_BYTES:
        raise RecipeError("the recipe is too large", where=file, expected=f"at most {MAX_BYTES} bytes")
    try:
        nodes = [node for node in _compose_all(text, file) if not _empty(node)]
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{file} (line {mark.line + 1})" if mark else file
        detail = (getattr(error, "problem", None) or str(error)).splitlines()[0]
        hint = "indent with spaces, not tabs" if r"'\t'" in detail else None
        raise RecipeError("not valid YAML", where=where, expected="YAML documents", got=detail, hint=hint) from None
    except RecursionError:
        raise RecipeError("the recipe is nested too deeply", where=file, expected=f"depth {MAX_DEPTH}") from None
    if not nodes:
        raise RecipeError("the text is empty", where=file, hint="deus-merge --help and recipes/ have examples")
    reader = _Reader(file)
    return tuple(reader.read(node, "", 0) for node in nodes)


_TAG = "tag:yaml.org,2002:"
_PLAIN = (f"{_TAG}seq", f"{_TAG}map")


def _empty(node: yaml.Node) -> bool:
    """Whether a document has no content, like the one after a final separator."""
    return isinstance(node, yaml.ScalarNode) and node.value == "" and node.style is None


def _tag(node: yaml.Node) -> str:
    """A node's tag as recipes write it."""
    return f"!!{node.tag.removeprefix(_TAG)}" if node.tag.startswith(_TAG) else node.tag


def _compose_all(text: str, file: str) -> Iterator[yaml.Node]:
    loader = _Loader(text, file)
    try:
        while loader.check_node():
            node = loader.get_node()
            if node is not None:
                yield node
    finally:
        loader.dispose()


class _Loader(yaml.SafeLoader):
    """A loader that checks the bounds while it reads, since PyYAML's time for a value grows with its depth."""

    def __init__(self, text: str, file: str):
        super().__init__(text)
        self.file = file
        self.depth = self.written = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
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

    def _scalar(self, node: yaml.ScalarNode, place: Located) -> Scalar:
        if node.tag == f"{_TAG}timestamp":
            return node.value  # in a recipe, dates are text
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
                here.fail(f"duplicate key {key!r}", expected="each key once", got=key)
            items[key] = self.read(value_node, _under(path, key), depth + 1)
        return items
