"""The other files of a checkpoint: generation config, tokenizer, chat template, licence."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from ..checkpoint.reader import TensorSource
from ..core.located import Located
from .tokenizer.build import Vocabulary
from .tokenizer.chat_template import find_template, set_template
from .tokenizer.files import TOKENIZER_FILES, present
from .tokenizer.special import GENERATION, set_generation

_DONOR_FILES = (
    GENERATION, "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json",
    "normalizer.json", "LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", "USE_POLICY.md",
)  # fmt: skip


def output_side_files(
    models: Mapping[str, TensorSource],
    donor: TensorSource,
    vocabulary: Vocabulary | None = None,
    chat_template: Located | None = None,
) -> tuple[dict[str, bytes | Path], list[str]]:
    """The files of an output other than weights and config.json.

    Args:
        models: Every model of the recipe, by name.
        donor: The model whose files the output takes.
        vocabulary: The output's tokens, where the recipe configures them.
        chat_template: The recipe's ``chat_template``, text.

    Returns:
        Every file's name with its bytes or the file to copy, and warnings.

    Raises:
        RecipeError: the chat template is neither a known name nor a template.
        CheckpointError: a link that leads out of a model's folder.
    """
    files: dict[str, bytes | Path] = _own_files(donor)
    files |= vocabulary.files if vocabulary else present(donor.side_files, TOKENIZER_FILES)
    warnings: list[str] = []
    if vocabulary:
        files, warnings = set_generation(files, vocabulary)
    if chat_template is not None:
        known = [present(m.side_files, TOKENIZER_FILES) for m in models.values()]
        template = find_template(str(chat_template.value), chat_template, known)
        if template is None:
            warnings.append(f"{chat_template.where}: no model has a chat template")
        else:
            files = set_template(files, template)
    return dict(sorted(files.items())), warnings


def copied_files(source: TensorSource) -> dict[str, bytes | Path]:
    """All files of a model other than weights and config.json: name -> bytes, or a file to copy."""
    return dict(sorted((_own_files(source) | present(source.side_files, TOKENIZER_FILES)).items()))


def _own_files(source: TensorSource) -> dict[str, bytes | Path]:
    """The files that never come from another model: its code (copied, not run), generation config, licence."""
    code = [n for n in source.side_files if n.endswith(".py")] if '"auto_map"' in json.dumps(source.config) else []
    return present(source.side_files, (*code, *_DONOR_FILES))
