"""Writes docs/recipe.schema.json, which editors check recipes with; a test checks that it is up to date. Run:
python docs/make_recipe_schema.py"""

from __future__ import annotations

import json
from pathlib import Path

from deus_merge.recipe.schema import recipe_schema

PAGE = Path(__file__).parent / "recipe.schema.json"


def render() -> str:
    """The file's text: what ``deus-merge recipes --schema`` prints."""
    return json.dumps(recipe_schema(), indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
