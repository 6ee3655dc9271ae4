"""Text for training, read by a model's own tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.errors import TrainingError
from ..models.tokenizer.files import TOKENIZER_FILES

if TYPE_CHECKING:
    from torch import Tensor


def load_tokenizer(folder: Path, model: object = None) -> Any:
    """The tokenizer of a model.

    Args:
        folder: A folder with the tokenizer and config of the model.
        model: The name of the model in messages; None for the folder.

    Raises:
        TrainingError: there is none, or transformers cannot load it.
    """
    import transformers

    model = folder if model is None else model
    if not any((folder / name).exists() for name in TOKENIZER_FILES):
        hint = "tokenizer.save_pretrained(folder) puts one there"
        raise TrainingError("there is no tokenizer to read the text with", where=model, hint=hint)
    try:
        return transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (ImportError, ValueError, OSError) as error:  # it may need a package that is not installed
        why = " ".join(str(error).split())
        raise TrainingError("transformers cannot load the tokenizer", where=model, got=why) from None


def check_rows(ids: Tensor, vocabulary: int, tokenizer: Any, model: object) -> None:
    """Check that a model has a row for every token of a text.

    Args:
        ids: Token ids, of any shape.
        vocabulary: The number of tokens that the model has rows for.
        tokenizer: The tokenizer, for the message.
        model: The name of the model, for the message.

    Raises:
        TrainingError: it has not.
    """
    if ids.numel() and (largest := int(ids.max())) >= vocabulary:
        raise TrainingError(
            "the text has tokens that the model has no row for",
            where=model,
            expected=f"token ids below {vocabulary}",
            got=f"{largest}, {tokenizer.convert_ids_to_tokens(largest)!r}",
        )
