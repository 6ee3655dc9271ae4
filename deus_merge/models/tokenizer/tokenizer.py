"""A model's tokenizer as transformers loads it: what that makes of the files is what the model was trained with."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from ...core.errors import CheckpointError
from .files import Files, as_json, content

if TYPE_CHECKING:
    import tokenizers
    import transformers

_ROLES = ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id")


@dataclass(frozen=True)
class Tokenizer:
    """A loaded tokenizer.

    Attributes:
        tokens: Token -> id, added ones too, in the order of the ids.
        roles: ``bos_token_id`` and the like -> id, where there is such a token.
        backend: The tokenizers library's own.
    """

    tokens: Mapping[str, int]
    roles: Mapping[str, int]
    backend: tokenizers.Tokenizer

    @cached_property
    def data(self) -> Mapping:
        """What its tokenizer.json would be."""
        return json.loads(self.backend.to_str())


def load(files: Files, config: Mapping, where: object) -> Tokenizer:
    """Load the tokenizer that stands beside a model, or will.

    Args:
        files: Of the tokenizer, by name.
        config: The model's config.json: it can decide how they are loaded.
        where: The model, for messages.

    Raises:
        CheckpointError: transformers cannot, or has no fast one.
    """
    with tempfile.TemporaryDirectory() as folder:
        for name, file in {**files, "config.json": as_json(config, indent=2)}.items():
            if isinstance(file, bytes):
                (Path(folder) / name).write_bytes(file)
            else:
                (Path(folder) / name).symlink_to(file.absolute())
        try:
            loaded = _from_pretrained(folder)
        except Exception as error:  # files of others make the library raise whatever it likes
            reason = f"{type(error).__name__}: {error}".splitlines()[0].replace(folder, str(where))
            raise CheckpointError("the tokenizer cannot be loaded", where=where, got=reason) from None
    if not loaded.is_fast:
        raise CheckpointError(
            "the tokenizer is not a fast one",
            where=where,
            expected="a tokenizer.json, or files that transformers makes one of",
            got=type(loaded).__name__,
        )
    tokens = dict(sorted(loaded.get_vocab().items(), key=lambda item: item[1]))
    roles = {role: i for role in _ROLES if (i := getattr(loaded, role, None)) is not None}
    return Tokenizer(tokens, roles, loaded.backend_tokenizer)


def _from_pretrained(folder: str) -> transformers.PreTrainedTokenizerBase:
    """Without a word, without the network, and without running anybody's code."""
    import transformers

    known = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    try:
        return transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    finally:
        transformers.utils.logging.set_verbosity(known)


def tokens_digest(tokens: Mapping[str, int]) -> str:
    """sha256 over tokens and their ids."""
    return hashlib.sha256(json.dumps(tokens, sort_keys=True).encode()).hexdigest()


def identity(files: Files, config: Mapping) -> str:
    """Equal for files that load alike."""
    digest = hashlib.sha256(repr((config.get("model_type"), config.get("tokenizer_class"))).encode())
    for name, file in sorted(files.items()):
        digest.update(name.encode() + hashlib.sha256(content(file)).digest())
    return digest.hexdigest()
