"""Changes to a recipe before it is read: other models, other values.

Anchors are expanded before: a change applies to the one place that it names.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from ..checkpoint.hub import split_adapter
from ..core.errors import RecipeError, nearest
from ..core.located import Located, locate, under
from ..core.text import some_of
from ..core.yaml_text import parse
from ..models.tokenizer.settings import WORDS
from .references import read_model

_Documents = tuple[Located, ...]
_FORM = "PATH=VALUE, like upscale.insert=all or slices.0.parameters.t=0.3"
_NAME_MODELS = frozenset(("base_model", "model", "tokenizer_source", "source"))


def with_values(documents: Sequence[Located], settings: Sequence[str]) -> _Documents:
    """The documents with other values.

    Args:
        documents: The documents of a recipe.
        settings: ``PATH=VALUE``: a dotted path, to which the last document (the one without a name) is the root, or
            the document before a colon (``NAME:PATH=VALUE``); and a value as YAML. Missing mappings are added.

    Raises:
        RecipeError: not of this form, a path that the recipe cannot have, or one that is set twice.
    """
    done, seen = list(documents), set()
    for setting in settings:
        text, equals, value = setting.partition("=")
        name, colon, inner = text.partition(":")
        names = [_name(document) for document in done]
        known = [n for n in names if n is not None]
        path = inner if colon and name in known else text
        option = f"--set {text}"
        if not equals or not path.strip() or not value.strip():
            raise RecipeError("not a setting", where="--set", expected=_FORM, got=setting)
        keys = re.sub(r"\[(\d+)\]", r".\1", path).split(".")
        if not all(keys):
            raise RecipeError("not a path", where="--set", expected=_FORM, got=text)
        at = names.index(name) if path is inner else names.index(None) if None in names else len(names) - 1
        if (at, *keys) in seen:
            raise RecipeError("the value is set twice", where=option, expected="each path once")
        seen.add((at, *keys))
        done[at] = _put(done[at], keys, parse(value, option), option)
    return tuple(done)


def changed_text(text: str, changes: Sequence[str], settings: Sequence[str]) -> str:
    """A recipe's text with a comment at its end for each change that it was run with.

    Args:
        text: The recipe as it was written.
        changes, settings: As for `with_models` and `with_values`.
    """
    options = [f"--model {change}" for change in changes] + [f"--set {setting}" for setting in settings]
    if not options:
        return text
    lines = [f"#   {line}" for option in options for line in option.splitlines()]
    return "\n".join([text.rstrip("\n"), "# It was run with these changes; deus_merge.yml has them:", *lines, ""])


def _name(document: Located) -> str | None:
    """The name of a document, if it has one."""
    place = document.value.get("name") if isinstance(document.value, dict) else None
    return place.value if place is not None and isinstance(place.value, str) else None


def _put(node: Located, keys: Sequence[str], value: Located, option: str) -> Located:
    """The tree with the value at a path."""
    if not keys:
        return locate(value.plain(), node.path, "--set")
    key, *rest = keys
    if isinstance(node.value, tuple):
        if not key.isdecimal() or int(key) >= len(node.value):
            last = len(node.value) - 1
            wanted = f"a number from 0 to {last}" if last >= 0 else "nothing: the list is empty"
            raise RecipeError(f"{node.path or 'the recipe'} is a list", where=option, expected=wanted, got=key)
        items = list(node.value)
        items[int(key)] = _put(items[int(key)], rest, value, option)
        return replace(node, value=tuple(items))
    if node.value is None or isinstance(node.value, dict):
        inner = node.value or {}
        empty = Located(None, under(node.path, key), file="--set")
        return replace(node, value={**inner, key: _put(inner.get(key, empty), rest, value, option)})
    nested = value.shown() if isinstance(value.value, dict | tuple) else str(value.plain())
    for inner_key in reversed(keys):
        nested = f"{{{inner_key}: {nested}}}"
    raise RecipeError(
        f"{node.path} has no keys: it is a value",
        where=option,
        expected="a mapping or a list",
        got=node.shown(),
        hint=f"to replace the value: --set '{node.path}={nested}'",
    )


def with_models(documents: Sequence[Located], changes: Sequence[str]) -> _Documents:
    """The documents with other models.

    Args:
        documents: The documents of a recipe.
        changes: Models as recipes write them: one for a recipe with exactly one model; ``OLD=NEW`` for others. A model
            with an adapter keeps the adapter where OLD is the model without it.

    Raises:
        RecipeError: no model is OLD, or the recipe has not exactly one model.
    """
    if not changes:
        return tuple(documents)
    names = {_name(document) for document in documents} if len(documents) > 1 else set()
    places = [place for document in documents for place in _references(document, names)]
    texts = {id(place): read_model(place).text for place in places}
    known = list(dict.fromkeys(texts.values()))
    parts = list(dict.fromkeys([*known, *(split_adapter(text)[0] for text in known)]))
    new: dict[int, Located] = {}
    for change in changes:
        old, equals, model = change.partition("=")
        if not equals or (old not in parts and Path(change).exists()):
            if len(known) != 1 or len(changes) > 1:
                raise RecipeError(
                    f"the recipe has {len(known)} models" if len(known) != 1 else "one model cannot be several",
                    where=f"--model {change}",
                    expected=f"OLD=NEW, where OLD is one of {some_of(known, 20)}" if known else "a recipe with a model",
                    got=change,
                )
            old, model = known[0], change
        if old not in parts:
            raise RecipeError(
                f"the recipe has no model {old!r}",
                where=f"--model {change}",
                expected=" | ".join(parts),
                got=old,
                hint=nearest(old, parts),
            )
        if not model.strip():
            raise RecipeError("no model", where=f"--model {change}", expected=f"{old}=a folder or org/name")
        for place in places:
            text = texts[id(place)]
            base, adapter = split_adapter(text)
            if text == old or base == old:
                put = model if text == old else f"{model}+{adapter}"
                new[id(place)] = Located(put, place.path, file="--model")
    return tuple(_rebuilt(document, new) for document in documents)


def _references(node: Located, names: set[str | None]) -> Iterator[Located]:
    """Every value that names a model, except other documents."""
    if isinstance(node.value, tuple):
        for item in node.value:
            yield from _references(item, names)
    if not isinstance(node.value, dict):
        return
    for key, item in node.value.items():
        if key == "parameters":
            continue
        long_form = isinstance(item.value, dict) and ("path" in item.value or "lora" in item.value)
        long_form = long_form or (isinstance(item.value, dict) and "override_architecture" in item.value)
        if key not in _NAME_MODELS or not (long_form or isinstance(item.value, str)):
            yield from _references(item, names)
        elif (text := read_model(item).text) not in WORDS and split_adapter(text)[0] not in names:
            yield item


def _rebuilt(node: Located, new: Mapping[int, Located]) -> Located:
    """The tree with other nodes."""
    if id(node) in new:
        return new[id(node)]
    if isinstance(node.value, dict):
        return replace(node, value={key: _rebuilt(item, new) for key, item in node.value.items()})
    if isinstance(node.value, tuple):
        return replace(node, value=tuple(_rebuilt(item, new) for item in node.value))
    return node
