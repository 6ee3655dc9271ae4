"""Combines all tokenizers of a recipe into the output's, and finds each model's row of each token. Reads no tensor."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ...checkpoint.hub import resolve
from ...checkpoint.reader import TensorSource
from ...core.errors import CheckpointError, PlanError, nearest
from ...core.located import Located
from ...core.text import plural
from ..reference import ModelRef
from . import union
from .files import (
    NON_VOCABULARY_FILES,
    TOKENIZER_FILES,
    Files,
    Json,
    as_json,
    beyond_rows,
    has_tokenizer,
    present,
    read_json,
)
from .settings import SOURCES, WORDS, TokenizerSettings, TokenSetting
from .tokenizer import Tokenizer, identity, load, tokens_digest

if TYPE_CHECKING:
    import numpy as np

_CONFIG = "tokenizer_config.json"


@dataclass(frozen=True)
class Member:
    """A model of the recipe.

    Attributes:
        model: The recipe's reference to it.
        checkpoint: Its tensors.
        tensors: Names of its stored embeddings and head.
    """

    model: ModelRef
    checkpoint: TensorSource
    tensors: tuple[str, ...]

    @property
    def rows(self) -> int:
        """Number of tokens with an embedding."""
        return self.checkpoint.tensors[self.tensors[0]].shape[0]


@dataclass(frozen=True)
class Chosen:
    """The embedding that the recipe chooses for a token.

    Attributes:
        model: The model of the row, as an index into the members; None for zeros.
        row: The row.
        force: Whether models that have an embedding of the token take this one too.
    """

    model: int | None
    row: int
    force: bool


@dataclass(frozen=True)
class Vocabulary:
    """The output's tokens.

    Attributes:
        source: ``union``, ``base``, or the name of the model whose tokenizer it is.
        tokens: Token -> id.
        roles: ``bos_token_id`` and the like -> id.
        rows: Number of rows of the output's embeddings.
        own: (models, rows): each member's own row of the token of an output row; -1 for none.
        chosen: The embeddings that the recipe chooses, by output id.
        moves: Id of the donor's token -> id in the output.
        files: The output's tokenizer: name -> bytes, or a file to copy.
        warnings: Warnings for the user.
    """

    source: str
    tokens: Mapping[str, int]
    roles: Mapping[str, int]
    rows: int
    own: np.ndarray
    chosen: Mapping[int, Chosen]
    moves: Mapping[int, int]
    files: Files
    warnings: tuple[str, ...]

    @property
    def digest(self) -> str:
        """sha256 of the tokens and their ids."""
        return tokens_digest(self.tokens)


def build_vocabulary(
    settings: TokenizerSettings, members: Sequence[Member], cache_dir: Path | None = None
) -> Vocabulary:
    """Load every tokenizer and combine them by the recipe's settings.

    Args:
        settings: The recipe's settings.
        members: The recipe's models, the donor first.
        cache_dir: The hub's cache, for the tokenizer of another model; None for huggingface_hub's own.

    Raises:
        RecipeError, PlanError, CheckpointError: tokenizers, settings and embeddings do not fit together; with the place
            in the recipe.
    """
    import numpy as np

    warnings: list[str] = []
    loaded = _load_all(settings, members, warnings)
    embedded: list[dict[str, int]] = []  # per member, the tokens that have a row
    for member, tokenizer in zip(members, loaded, strict=True):
        stored = member.rows
        if beyond := [token for token, i in tokenizer.tokens.items() if i >= stored]:
            warnings.append(f"{beyond_rows(member.model, beyond, stored)}: they are ignored")
        embedded.append({token: i for token, i in tokenizer.tokens.items() if i < stored})
    output, files = _output(settings, members, loaded, cache_dir)
    rows = max(len(output.tokens), max(output.tokens.values(), default=0) + 1)
    rows += -rows % (settings.pad_to_multiple_of or 1)
    own = np.full((len(members), rows), -1, dtype=np.int64)  # (models, rows)
    for i, tokens in enumerate(embedded):
        pairs = np.array([(at, tokens[t]) for t, at in output.tokens.items() if t in tokens], dtype=np.int64)  # (n, 2)
        if len(pairs):
            own[i, pairs[:, 0]] = pairs[:, 1]
    chosen = {}
    for token, setting in settings.tokens.items():
        if setting.kind != "default":
            chosen[output.tokens[token]] = _choice(token, setting, members, embedded)
        if not any(token in tokenizer.tokens for tokenizer in loaded):
            hint = _nearest(token, output.tokens.keys() - {token})
            if setting.kind == "default":
                setting.place.fail(f"no model's tokenizer has a token {token!r}", expected=SOURCES, hint=hint)
            warnings.append(f"{token!r} is in no model's tokenizer: it is added" + (f" ({hint})" if hint else ""))
    moves = {i: output.tokens[token] for token, i in loaded[0].tokens.items() if token in output.tokens}
    return Vocabulary(
        str(settings.source), output.tokens, output.roles, rows, own, chosen, moves, files, tuple(warnings)
    )


def _load_all(settings: TokenizerSettings, members: Sequence[Member], warnings: list[str]) -> list[Tokenizer]:
    """Each member's tokenizer. A member without one is assumed to have the first member's."""
    found: dict[str, Tokenizer] = {}
    loaded: list[Tokenizer] = []
    for member in members:
        source = member.checkpoint
        files = present(source.side_files, TOKENIZER_FILES)
        if not has_tokenizer(files):
            _assume(settings, member, members[0], warnings)
            loaded.append(loaded[0])
            continue
        key = identity(files, source.config)
        if key not in found:
            with _at(settings.place):
                found[key] = load(files, source.config, source.where)
        loaded.append(found[key])
    return loaded


def _assume(settings: TokenizerSettings, member: Member, first: Member, warnings: list[str]) -> None:
    if member is first or member.rows != first.rows:
        settings.place.fail(
            f"{member.model} has no tokenizer",
            expected="tokenizer.json, or another file that transformers can convert",
            got=f"none of them, and {plural(member.rows, 'row')} of embeddings"
            + f", not {first.rows}" * (member is not first),
        )
    warnings.append(f"{member.model} has no tokenizer: that of {first.model} is assumed")


def _output(
    settings: TokenizerSettings, members: Sequence[Member], loaded: Sequence[Tokenizer], cache_dir: Path | None
) -> tuple[Tokenizer, Files]:
    """The output's tokenizer and its files, which are the files of one model unless the tokens change."""
    files, tokenizer, rows = _first_tokenizer(settings, members, loaded, cache_dir)

    def replace_data(data: Json) -> None:
        """Load a changed tokenizer.json with transformers, which adds special tokens that other files name."""
        nonlocal tokenizer, files
        if data is not tokenizer.data:
            files = _changed(files, data)
            tokenizer = load(files, members[0].checkpoint.config, "the output")

    with _at(settings.place):
        if rows is not None:
            replace_data(union.limited(tokenizer.data, rows))
        if settings.source == "union":
            others = [
                union.Named(m.model, union.limited(t.data, m.rows))
                for m, t in zip(members[1:], loaded[1:], strict=True)
            ]
            replace_data(union.united([union.Named(members[0].model, tokenizer.data), *others]))
        replace_data(union.with_tokens(tokenizer.data, list(settings.tokens)))
    return tokenizer, files


def _changed(files: Files, data: Json) -> Files:
    """A tokenizer's files with another tokenizer.json; other files with a vocabulary are left out."""
    files = {name: file for name, file in files.items() if name in NON_VOCABULARY_FILES} | {
        "tokenizer.json": as_json(data)
    }
    config = read_json(files[_CONFIG], _CONFIG) if _CONFIG in files else {}
    if "added_tokens_decoder" in config:
        entries = {str(t["id"]): {k: v for k, v in t.items() if k != "id"} for t in data["added_tokens"]}
        files[_CONFIG] = as_json(config | {"added_tokens_decoder": entries}, indent=2)
    return files


def _first_tokenizer(
    settings: TokenizerSettings, members: Sequence[Member], loaded: Sequence[Tokenizer], cache_dir: Path | None
) -> tuple[Files, Tokenizer, int | None]:
    """The tokenizer that the output takes or extends: its files, itself, and its model's rows if that is a member."""
    for member, tokenizer in zip(members, loaded, strict=True):
        if settings.source in (*WORDS, member.model):
            return present(member.checkpoint.side_files, TOKENIZER_FILES), tokenizer, member.rows
    names = [*WORDS, *(str(m.model) for m in members)]
    with _at(settings.place, nearest(str(settings.source), names)):
        folder = resolve(str(settings.source), cache_dir=cache_dir, weights=False)
        files = present({path.name: path for path in folder.iterdir() if path.is_file()}, TOKENIZER_FILES)
        config = read_json(folder / "config.json", "config") if (folder / "config.json").is_file() else {}
        return files, load(files, config, folder), None


def _choice(
    token: str, setting: TokenSetting, members: Sequence[Member], embedded: Sequence[Mapping[str, int]]
) -> Chosen:
    """The embedding that the recipe chooses for a token."""
    if setting.kind == "zero":
        return Chosen(None, 0, setting.force)
    names = [str(m.model) for m in members]
    model = next((i for i, m in enumerate(members) if m.model == setting.model), None)
    if model is None:
        setting.place.fail(
            f"the embedding of {token!r} comes from a model that is not in the recipe",
            expected=" or ".join(names),
            got=str(setting.model),
            hint=nearest(str(setting.model), names),
        )
    wanted = token if setting.kind == "model" else setting.token
    row = setting.token_id if wanted is None else embedded[model].get(wanted)
    if row is None:
        setting.place.fail(
            f"{names[model]} has no embedding for a token {wanted!r}",
            expected=f"one of its {plural(len(embedded[model]), 'token')}",
            got=wanted,
            hint=_nearest(str(wanted), embedded[model]),
        )
    if row >= members[model].rows:
        setting.place.fail(
            f"{names[model]} has no row {row}", expected=f"a token_id below {members[model].rows}", got=row
        )
    return Chosen(model, row, setting.force)


def _nearest(token: str, known: Iterable[str]) -> str | None:
    """A hint with the closest token. Only tokens with the same first character and a similar length are compared."""
    return nearest(token, [t for t in known if t[:1] == token[:1] and abs(len(t) - len(token)) < 4])


@contextmanager
def _at(place: Located, hint: str | None = None) -> Iterator[None]:
    """Adds the place in the recipe to errors about a file that it refers to."""
    try:
        yield
    except (CheckpointError, PlanError) as error:
        error.where = f"{place.where}: {error.where}"
        error.hint = error.hint or hint
        raise
