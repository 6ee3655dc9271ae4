"""Reads YAML text as a `Located` tree.

The values are those of `yaml.safe_load`, with stricter reading: duplicate keys are refused, the expansion of anchors
and merge keys is bounded, and only plain data is accepted.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import yaml

from .errors import RecipeError
from .located import Located, Scalar, under

MAX_BYTES = 1_000_000
MAX_DEPTH = 32
MAX_WRITTEN = 20_000  # values in the text, before anchors are expanded: reading one takes about 20 microseconds
MAX_NODES = 200_000  # values after anchors are expanded ("billion laughs")
MAX_SCALAR = 400  # characters of a value that is not text: reading YAML's base 60 numbers takes quadratic time


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
        raise _syntax_error(error, file) from None
    except RecursionError:
        raise RecipeError("the recipe is nested too deeply", where=file, expected=f"depth {MAX_DEPTH}") from None
    if not nodes:
        raise RecipeError("the text is empty", where=file, hint="deus-merge --help and recipes/ have examples")
    reader = _Reader(file)
    return tuple(reader.read(node, "", 0) for node in nodes)


_OPENED = {"sequence": "list", "mapping": "mapping", "scalar": "text"}
_ENDS = {"'<stream end>'": "the end of the text", "end of stream": "the end of the text"}


def _syntax_error(error: yaml.YAMLError, file: str) -> RecipeError:
    """PyYAML's error as one of ours: the line, what is expected, what is there, and what to do."""
    mark, opened = getattr(error, "problem_mark", None), getattr(error, "context_mark", None)
    where = f"{file} (line {mark.line + 1})" if mark else file
    problem = (getattr(error, "problem", None) or str(error)).splitlines()[0]
    wanted = re.fullmatch(r"expected (.+?),? but (?:got|found) (.+)", problem) or re.fullmatch(
        r"could not find expected (.+?)()", problem
    )
    expected, got = wanted.groups() if wanted else (None, problem)
    hint = None
    if r"'\t'" in problem:
        hint = "indent with spaces, not tabs"
    elif "mapping values are not allowed" in problem:
        hint = "one key: value in a line; quote text that contains ': '"
    elif opened and mark and opened.line != mark.line:
        what = next((word for name, word in _OPENED.items() if name in str(getattr(error, "context", ""))), "part")
        hint = f"the {what} that begins in line {opened.line + 1} does not end before"
    return RecipeError("not valid YAML", where=where, expected=expected, got=_ENDS.get(got, got) or None, hint=hint)


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
        pairs = self._pairs(node, path, depth)
        values = {key: self.read(value, under(path, key), depth + 1) for key, (_, value) in pairs.items()}
        if depth:
            return values
        parts = {key: set(_nodes(value)) for key, (_, value) in pairs.items()}
        uses = Counter(part for part_of in parts.values() for part in part_of)
        written = {id(value) for _, value in node.value}
        own = {key for key, (_, value) in pairs.items() if id(value) in written}  # not by a merge key
        return {
            k: replace(v, shared=True) if k in own and any(uses[part] > 1 for part in parts[k]) else v
            for k, v in values.items()
        }

    def _pairs(self, node: yaml.MappingNode, path: str, depth: int) -> dict[str, tuple[yaml.ScalarNode, yaml.Node]]:
        """Key -> its node and its value's, with the keys of ``<<``: the mapping's own take precedence over these, and
        of several merged mappings the first one."""
        own: dict[str, tuple[yaml.ScalarNode, yaml.Node]] = {}
        merged: dict[str, tuple[yaml.ScalarNode, yaml.Node]] = {}
        for key_node, value_node in node.value:
            key = key_node.value
            here = Located(None, path, key_node.start_mark.line + 1, self.file)
            if not isinstance(key, str):
                here.fail("a key must be text", expected="key: value", got=type(key).__name__)
            if key in own:
                several = "<<: [*one, *other]" if key == "<<" else None
                here.fail(f"duplicate key {key!r}", expected="each key once", got=key, hint=several)
            own[key] = key_node, value_node
            if key_node.tag != f"{_TAG}merge":
                continue
            if depth > MAX_DEPTH:
                here.fail("the recipe is nested too deeply", expected=f"at most {MAX_DEPTH} levels", got="more")
            for source in value_node.value if isinstance(value_node, yaml.SequenceNode) else [value_node]:
                if not isinstance(source, yaml.MappingNode):
                    here.fail("<< merges mappings", expected="<<: *anchor, or a list of such", got=_tag(source))
                for name, pair in self._pairs(source, path, depth + 1).items():
                    merged.setdefault(name, pair)
                    self.nodes += 1
                    if self.nodes > MAX_NODES:
                        here.fail("the recipe's anchors make it too large", expected=f"at most {MAX_NODES} values")
        written = {key: pair for key, pair in own.items() if pair[0].tag != f"{_TAG}merge"}
        return {**{key: pair for key, pair in merged.items() if key not in written}, **written}


def _nodes(node: yaml.Node) -> Iterator[int]:
    """The identities of a node and of all nodes in it, each once; an alias is the node that it refers to."""
    seen, rest = set(), [node]
    while rest:
        part = rest.pop()
        if id(part) in seen:
            continue
        seen.add(id(part))
        yield id(part)
        if isinstance(part, yaml.MappingNode):
            rest += [node for pair in part.value for node in pair]
        elif isinstance(part, yaml.SequenceNode):
            rest += part.value
