"""The files beside the weights: generation config, tokenizer, chat template, licence."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from .recipe import Recipe
from .vocabulary.build import Vocabulary
from .vocabulary.chat import find_template, set_template
from .vocabulary.files import TOKENIZER_FILES, present
from .vocabulary.special import GENERATION, set_generation

_DONOR_FILES = (GENERATION, "LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", "USE_POLICY.md")


def extra_files(
    recipe: Recipe, models: Mapping[str, Path], donor: Path, vocabulary: Vocabulary | None = None
) -> tuple[dict[str, bytes | Path], list[str]]:
    """What to put beside the weights.

    Args:
        recipe: Its ``chat_template`` is followed.
        models: Folder of each model the recipe names.
        donor: The folder of the model that gives everything else.
        vocabulary: The output's tokens, where the recipe says something of them.

    Returns:
        File name -> its bytes, or a file to copy; and what the user should know.

    Raises:
        RecipeError: a chat template that is none.
    """
    code = sorted(donor.glob("*.py")) if b'"auto_map"' in (donor / "config.json").read_bytes() else []
    files: dict[str, bytes | Path] = {p.name: p for p in code}
    files |= present(donor, _DONOR_FILES)
    files |= vocabulary.files if vocabulary else present(donor, TOKENIZER_FILES)
    warnings: list[str] = []
    if vocabulary:
        files, warnings = set_generation(files, vocabulary)
    if recipe.chat_template is not None:
        place = recipe.source.value["chat_template"]
        template = find_template(recipe.chat_template, place, models)
        if template is None:
            warnings.append(f"{place.where}: no model has a chat template")
        else:
            files = set_template(files, template)
    return dict(sorted(files.items())), warnings
