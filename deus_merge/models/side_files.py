"""The files beside the weights: generation config, tokenizer, chat template, licence."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from ..checkpoint.reader import TensorSource
from ..recipe.types import Recipe
from .tokenizer.build import Vocabulary
from .tokenizer.chat_template import find_template, set_template
from .tokenizer.files import TOKENIZER_FILES, present
from .tokenizer.special import GENERATION, set_generation

_DONOR_FILES = (
    GENERATION, "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json",
    "normalizer.json", "LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", "USE_POLICY.md",
)  # fmt: skip


def extra_files(
    recipe: Recipe, models: Mapping[str, TensorSource], donor: TensorSource, vocabulary: Vocabulary | None = None
) -> tuple[dict[str, bytes | Path], list[str]]:
    """What to put beside the weights.

    Args:
        recipe: Its ``chat_template`` is followed.
        models: Each model the recipe names.
        donor: The model that gives everything else.
        vocabulary: The output's tokens, where the recipe says something of them.

    Returns:
        File name -> its bytes, or a file to copy; and what the user should know.

    Raises:
        RecipeError: a chat template that is none.
        CheckpointError: a link that leads out of a model's folder.
    """
    files: dict[str, bytes | Path] = _own_files(donor)
    files |= vocabulary.files if vocabulary else present(donor.side_files, TOKENIZER_FILES)
    warnings: list[str] = []
    if vocabulary:
        files, warnings = set_generation(files, vocabulary)
    if recipe.chat_template is not None:
        place = recipe.source.value["chat_template"]
        known = [present(m.side_files, TOKENIZER_FILES) for m in models.values()]
        template = find_template(recipe.chat_template, place, known)
        if template is None:
            warnings.append(f"{place.where}: no model has a chat template")
        else:
            files = set_template(files, template)
    return dict(sorted(files.items())), warnings


def copied_files(source: TensorSource) -> dict[str, bytes | Path]:
    """Everything beside a model's weights and config that belongs to it: name -> bytes, or a file to copy."""
    return dict(sorted((_own_files(source) | present(source.side_files, TOKENIZER_FILES)).items()))


def _own_files(source: TensorSource) -> dict[str, bytes | Path]:
    """What comes from no other model than the weights do: its code (copied, never run), generation config, licence."""
    code = [n for n in source.side_files if n.endswith(".py")] if '"auto_map"' in json.dumps(source.config) else []
    return present(source.side_files, (*code, *_DONOR_FILES))
