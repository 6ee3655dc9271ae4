"""Tokenizers as files, and the ids of their tokens as far as tokenizer.json shows them, without transformers."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...checkpoint.header import parse_json, read_small
from ...core.errors import CheckpointError, json_text
from ...core.text import plural, some_of
from ..reference import ModelRef

_JSON = "tokenizer.json"
_VOCABULARY = (_JSON, "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model")
_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
CHAT_FILES = ("chat_template.jinja", "chat_template.json")
TOKENIZER_FILES = (*_VOCABULARY, *_SETTINGS, *CHAT_FILES)
#: vocabularies that transformers does not load by itself, further templates, and prompts that belong to a template
_OTHER = re.compile(
    r"tekken\.json|.+\.tiktoken|tiktoken\.model|tokenizer\.model\.v.+|sentencepiece\.bpe\.model|spm\.model|vocab\.bpe"
    r"|(source|target|vocab)\.spm|additional_chat_templates/.+|SYSTEM_PROMPT\.txt"
)
#: the files that a changed tokenizer keeps: without vocabularies, since tokenizer.json has the only one
NON_VOCABULARY_FILES = ("tokenizer_config.json", "special_tokens_map.json", *CHAT_FILES)

Files = Mapping[str, bytes | Path]
#: a parsed JSON object; its values may be anything until they are checked
Json = Mapping[str, Any]


def present(files: Files, names: Sequence[str]) -> dict[str, bytes | Path]:
    """The files that have one of these names, to be copied or described in an output.

    Raises:
        CheckpointError: a link that leads out of the model's folder.
    """
    found = {name: files[name] for name in names if name in files}
    for name, path in found.items():
        if isinstance(path, Path):
            _check_link(path, path.parents[name.count("/")])
    return found


def is_tokenizer_file(name: str) -> bool:
    """Whether a file of a model's folder is part of its tokenizer."""
    return name in TOKENIZER_FILES or bool(_OTHER.fullmatch(name))


def _check_link(path: Path, folder: Path) -> None:
    """Refuse a link that would copy private files of the user into the output.

    A link may lead to a place in the folder, to the blobs of its repository in the hub's cache, or to a file of the
    same name, except for code and files in folders, whose names the model chooses. Weights and config.json may be links
    to any place, since they are parsed and not copied.

    Raises:
        CheckpointError: it leads to another place.
    """
    real, home = Path(os.path.realpath(path)), Path(os.path.realpath(folder))
    homes = {home, home.parent.parent / "blobs"} if home.parent.name == "snapshots" else {home}
    if not homes & set(real.parents) and (real.name != path.name or path.suffix == ".py" or path.parent != folder):
        raise CheckpointError(
            "a link leads out of the model's folder",
            where=path,
            expected="a file, since it is copied into the output",
            got=f"a link to {real}",
            hint="put a copy of the file in its place, if you want it to be part of the output: cp -L",
        )


def has_tokenizer(files: Files) -> bool:
    """Whether one of these files has a vocabulary."""
    return bool(present(files, _VOCABULARY))


def with_adapter(model: Files, adapter: Files) -> tuple[Files, str | None]:
    """The side files of a model with an adapter, which may have been trained with a tokenizer of its own.

    Args:
        model: The files of the model.
        adapter: The files of the adapter.

    Returns:
        The model's files, with the adapter's tokenizer where it has one that differs; and a sentence about it.
    """
    own = {name: file for name, file in adapter.items() if is_tokenizer_file(name)}
    other = [name for name, file in own.items() if name not in model or content(model[name]) != content(file)]
    if not other:
        return model, None
    if not has_tokenizer(own):
        return model, f"is not copied from the adapter, which has no vocabulary: {some_of(other)}"
    files = {name: file for name, file in model.items() if not is_tokenizer_file(name)}
    return files | own, f"is that of the adapter, where the model's differs: {some_of(other)}"


def content(file: bytes | Path) -> bytes:
    """The bytes of a file on disk or in memory."""
    return file if isinstance(file, bytes) else read_small(file)


def read_json(file: bytes | Path, name: str) -> dict:
    """The content of a JSON file; raises CheckpointError if it is not a JSON object."""
    return parse_json(content(file), file if isinstance(file, Path) else Path(name), name)


def as_json(data: Json, indent: int | None = None) -> bytes:
    """The bytes of a JSON file, on one line without ``indent``."""
    text = json.dumps(data, ensure_ascii=False) if indent is None else json_text(data, indent)
    return f"{text}\n".encode()


def model_tokens(model: Json) -> dict[str, int]:
    """Token -> id of the ``model`` of a tokenizer.json; the ids of a list (Unigram) are its indices."""
    tokens = model["vocab"]
    return {entry[0]: i for i, entry in enumerate(tokens)} if isinstance(tokens, list) else tokens


def token_ids(file: bytes | Path) -> dict[str, int]:
    """Token -> id of a tokenizer.json, with added tokens.

    Raises:
        CheckpointError: not a tokenizer.json.
    """
    data = read_json(file, _JSON)
    try:
        found = dict(model_tokens(data["model"])) | {t["content"]: t["id"] for t in data.get("added_tokens") or ()}
        if all(type(i) is int and i >= 0 for i in found.values()):
            return found
    except (KeyError, TypeError, IndexError, ValueError):
        pass
    raise CheckpointError("not a tokenizer", where=file if isinstance(file, Path) else _JSON, expected="tokens and ids")


def mismatch_warning(model: ModelRef, files: Files, rows: int) -> str | None:
    """A warning if a model's tokenizer does not fit its ``rows`` rows of embeddings or cannot be checked; else None."""
    if _JSON not in files:
        return None
    try:
        beyond = [token for token, i in token_ids(files[_JSON]).items() if i >= rows]
    except CheckpointError as error:
        return f"the tokenizer of {model} was not checked: {error.message} ({error.where})"
    return beyond_rows(model, beyond, rows) if beyond else None


def beyond_rows(model: ModelRef, tokens: Sequence[str], rows: int) -> str:
    """The warning about tokens whose id is beyond the embeddings."""
    return f"the tokenizer of {model} has {quoted(tokens)} beyond the {plural(rows, 'row')} of its embeddings"


def difference(models: Sequence[Files]) -> tuple[int, list[str]] | None:
    """The first model whose tokenizer has other tokens at the ids of the first model's tokenizer.

    Only tokenizer.json is compared; a file that equals the first one byte for byte is not parsed.

    Returns:
        The model's index and its differing tokens; None when all agree.
    """
    found = [files.get(_JSON) for files in models]
    if found[0] is None:
        return None
    known, first = content(found[0]), None
    for i, file in enumerate(found):
        if i == 0 or file is None or content(file) == known:
            continue
        try:
            first = first or token_ids(found[0])
            theirs = token_ids(file)
        except CheckpointError:
            continue  # the check of the model reports it
        names = {at: token for token, at in first.items()}
        if others := [t for t, at in theirs.items() if first.get(t, at) != at or names.get(at, t) != t]:
            return i, others
    return None


def quoted(tokens: Sequence[str]) -> str:
    """``5 tokens ('<a>', '<b>', '<c>' and 2 more)``"""
    return f"{len(tokens)} token{'s' if len(tokens) != 1 else ''} ({some_of(map(repr, tokens), 3)})"
