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

from ..errors import CheckpointError
from .files import TOKENIZER_FILES, Files, content, present

if TYPE_CHECKING:
    import tokenizers

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


def load(folder: Path) -> Tokenizer:
    """Load the tokenizer of a folder.

    Raises:
        CheckpointError: transformers cannot, or has no fast one.
    """
    import transformers

    known = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    try:
        loaded = transformers.AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
    except Exception as error:  # files of others make the library raise whatever it likes
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise CheckpointError("the tokenizer cannot be loaded", where=folder, got=reason) from None
    finally:
        transformers.utils.logging.set_verbosity(known)
    if not loaded.is_fast:
        raise CheckpointError(
            "the tokenizer is not a fast one",
            where=folder,
            expected="a tokenizer.json, or files that transformers makes one of",
            got=type(loaded).__name__,
        )
    tokens = dict(sorted(loaded.get_vocab().items(), key=lambda item: item[1]))
    roles = {role: i for role in _ROLES if (i := getattr(loaded, role, None)) is not None}
    return Tokenizer(tokens, roles, loaded.backend_tokenizer)


def load_files(files: Files, config: Path) -> Tokenizer:
    """Load a tokenizer whose files are not in a folder yet.

    Args:
        files: By name.
        config: The config.json that will stand beside them: it can decide how they are loaded.
    """
    with tempfile.TemporaryDirectory() as folder:
        for name, file in {**files, "config.json": config}.items():
            (Path(folder) / name).write_bytes(content(file))
        return load(Path(folder))


def tokens_digest(tokens: Mapping[str, int]) -> str:
    """sha256 over tokens and their ids."""
    return hashlib.sha256(json.dumps(tokens, sort_keys=True).encode()).hexdigest()


def identity(folder: Path, model_type: object) -> str:
    """Equal for folders whose tokenizers load alike."""
    digest = hashlib.sha256(repr(model_type).encode())
    for name, path in present(folder, TOKENIZER_FILES).items():
        digest.update(name.encode() + hashlib.sha256(content(path)).digest())
    return digest.hexdigest()
