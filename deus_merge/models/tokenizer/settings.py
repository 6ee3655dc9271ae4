"""``tokenizer_source`` and the ``tokenizer:`` section of a recipe.

Reference: mergekit 0.1.5, whose keys have the same meaning here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from ...core.located import Located, Plain
from ..reference import ModelRef

#: in place of a model: the tokens of all models, or of the base model
WORDS = ("union", "base")
_SECTION = ("source", "tokens", "pad_to_multiple_of")
_KINDS = {"zero": (), "model_token": ("model", "token", "token_id")}
#: the forms of a token's source, for messages
SOURCES = "a model, {kind: zero}, or {kind: model_token, model: ..., token: ... or token_id: ...}"

ReadModel = Callable[[Located], ModelRef]


@dataclass(frozen=True)
class TokenSetting:
    """A recipe's setting for the embedding of one token.

    Attributes:
        kind: ``default`` (as for tokens that the recipe does not name), ``model``, ``zero`` or ``model_token``.
        model: The model whose embedding is taken, for ``model`` and ``model_token``.
        token, token_id: The token of that model, for ``model_token``; one of the two is set.
        force: Whether models that have an embedding of the token take this one too.
        place: The place in the recipe.
    """

    kind: str = "default"
    model: ModelRef | None = None
    token: str | None = None
    token_id: int | None = None
    force: bool = False
    place: Located = field(compare=False, repr=False, default=Located(None))

    def plain(self, name: Callable[[ModelRef], str]) -> dict[str, Plain]:
        """The setting in a recipe's form, with models written by ``name``."""
        data: dict[str, Plain] = {}
        if self.kind == "model" and self.model is not None:
            data["source"] = name(self.model)
        elif self.kind == "zero":
            data["source"] = {"kind": "zero"}
        elif self.kind == "model_token" and self.model is not None:
            token: dict[str, Plain] = {"token": self.token} if self.token is not None else {"token_id": self.token_id}
            data["source"] = {"kind": "model_token", "model": name(self.model), **token}
        if self.force:
            data["force"] = True
        return data


@dataclass(frozen=True)
class TokenizerSettings:
    """A recipe's settings for the output's tokenizer.

    Attributes:
        source: ``union``, ``base``, or a model.
        tokens: Settings of single tokens.
        pad_to_multiple_of: The number of embedding rows is rounded up to a multiple of this; None for no rounding.
        place: The place in the recipe.
    """

    source: ModelRef | str = "union"
    tokens: Mapping[str, TokenSetting] = field(default_factory=dict)
    pad_to_multiple_of: int | None = None
    place: Located = field(compare=False, repr=False, default=Located(None))

    def plain(self, name: Callable[[ModelRef], str]) -> dict[str, Plain]:
        """The settings as keys of a recipe, with models written by ``name``."""
        source = self.source if isinstance(self.source, str) else name(self.source)
        if not self.tokens and self.pad_to_multiple_of is None:
            return {"tokenizer_source": source}
        data: dict[str, Plain] = {"source": source}
        if self.tokens:
            data["tokens"] = {token: setting.plain(name) for token, setting in self.tokens.items()}
        if self.pad_to_multiple_of is not None:
            data["pad_to_multiple_of"] = self.pad_to_multiple_of
        return {"tokenizer": data}


def read_tokenizer(top: Mapping[str, Located], read_model: ReadModel) -> TokenizerSettings | None:
    """Read the tokenizer settings of a recipe; None where it has none.

    Args:
        top: The recipe's keys.
        read_model: Reads a model reference.

    Raises:
        RecipeError: both ``tokenizer`` and ``tokenizer_source``, unknown keys, wrong values.
    """
    if "tokenizer_source" in top:
        if "tokenizer" in top:
            top["tokenizer"].fail(
                "a recipe has tokenizer or tokenizer_source, not both",
                expected="one of them",
                got="both",
                hint="write tokenizer_source as source: inside tokenizer",
            )
        place = top["tokenizer_source"]
        return TokenizerSettings(_source(place, read_model), place=place)
    if "tokenizer" not in top:
        return None
    place = top["tokenizer"]
    keys = place.mapping(_SECTION, "a tokenizer section")
    source = _source(keys["source"], read_model) if "source" in keys else "union"
    tokens = {}
    if "tokens" in keys and keys["tokens"].value is not None:
        named = keys["tokens"].mapping(kind="a mapping from tokens to their settings")
        tokens = {token: _token(node, read_model) for token, node in named.items()}
        if "" in tokens:
            named[""].fail("a token has at least one character")
    multiple = keys.get("pad_to_multiple_of")
    size = multiple.integer(1) if multiple is not None and multiple.value is not None else None
    return TokenizerSettings(source, tokens, size, place)


def _source(node: Located, read_model: ReadModel) -> ModelRef | str:
    return node.value if isinstance(node.value, str) and node.value in WORDS else read_model(node)


def _token(node: Located, read_model: ReadModel) -> TokenSetting:
    if node.value is None:
        return TokenSetting(place=node)
    keys = node.mapping(("source", "force"), "the settings of a token")
    force = keys["force"].value if "force" in keys else False
    if force not in (0, 1):
        keys["force"].fail("wrong value", expected="true or false")
    source = keys.get("source")
    if source is None or source.value is None:
        if force:
            node.fail("force needs a source", expected=f"source: {SOURCES}", got="force without source")
        return TokenSetting(place=node)
    if not isinstance(source.value, dict) or "kind" not in source.value:
        return TokenSetting("model", read_model(source), force=bool(force), place=source)
    kind = source.child("kind").choice(_KINDS, "kind of a token's source")
    inner = source.mapping(("kind", *_KINDS[kind]), SOURCES)
    if kind == "zero":
        return TokenSetting("zero", force=bool(force), place=source)
    given = [k for k in ("token", "token_id") if k in inner and inner[k].value is not None]
    if "model" not in inner or len(given) != 1:
        source.fail("a model_token has a model, and a token or a token_id", expected=SOURCES)
    token = inner["token"].value if given == ["token"] else None
    if token is not None and not isinstance(token, str):
        inner["token"].fail("wrong value", expected="a token, as text")
    token_id = inner["token_id"].integer() if given == ["token_id"] else None
    return TokenSetting("model_token", read_model(inner["model"]), token, token_id, bool(force), source)
