"""A model's tokenizer as transformers loads it, which is the tokenizer that the model was trained with."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, cast

from ...core.errors import CheckpointError
from ..config_json import Config
from .files import Files, Json, as_json, content

if TYPE_CHECKING:
    import tokenizers
    import transformers

_ROLES = ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id")


@dataclass(frozen=True)
class Tokenizer:
    """A loaded tokenizer.

    Attributes:
        tokens: Token -> id, with added tokens, in the order of ids.
        roles: ``bos_token_id`` and the like -> id, for the tokens that exist.
        backend: The object of the tokenizers library.
    """

    tokens: Mapping[str, int]
    roles: Mapping[str, int]
    backend: tokenizers.Tokenizer

    @cached_property
    def data(self) -> Json:
        """Its tokenizer.json, parsed."""
        return json.loads(self.backend.to_str())


def load(files: Files, config: Config, where: object) -> Tokenizer:
    """Load a model's tokenizer.

    Args:
        files: The tokenizer's files by name.
        config: The model's config.json, on which the tokenizer's class may depend.
        where: The model, for messages.

    Raises:
        CheckpointError: transformers cannot load it, or only as a slow tokenizer.
    """
    with tempfile.TemporaryDirectory() as folder:
        for name, file in {**files, "config.json": as_json(config, indent=2)}.items():
            if isinstance(file, bytes):
                (Path(folder) / name).write_bytes(file)
            else:
                (Path(folder) / name).symlink_to(file.absolute())
        try:
            loaded = _from_pretrained(folder)
        except Exception as error:  # for malformed files, the library raises exceptions of many types
            reason = f"{type(error).__name__}: {error}".splitlines()[0].replace(folder, str(where))
            raise CheckpointError("the tokenizer cannot be loaded", where=where, got=reason) from None
    if not loaded.is_fast:
        raise CheckpointError(
            "the tokenizer is not a fast one",
            where=where,
            expected="a tokenizer.json, or files that transformers can convert",
            got=type(loaded).__name__,
        )
    tokens = dict(sorted(loaded.get_vocab().items(), key=lambda item: item[1]))
    roles = {role: i for role in _ROLES if (i := getattr(loaded, role, None)) is not None}
    return Tokenizer(tokens, roles, cast("tokenizers.Tokenizer", loaded.backend_tokenizer))


def _from_pretrained(folder: str) -> transformers.PreTrainedTokenizerBase:
    """Load without messages, without the network, and without running code of the model."""
    import transformers

    known = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    try:
        return transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    finally:
        transformers.utils.logging.set_verbosity(known)


def tokens_digest(tokens: Mapping[str, int]) -> str:
    """sha256 of tokens and their ids."""
    return hashlib.sha256(json.dumps(tokens, sort_keys=True).encode()).hexdigest()


def identity(files: Files, config: Config) -> str:
    """A digest that is equal for files that load as equal tokenizers."""
    digest = hashlib.sha256(repr((config.get("model_type"), config.get("tokenizer_class"))).encode())
    for name, file in sorted(files.items()):
        digest.update(name.encode() + hashlib.sha256(content(file)).digest())
    return digest.hexdigest()
