"""The recipes that ship with the package: the files in recipes/.

In a wheel they are in the package (docs/wheel.py puts them there); in a checkout and in an editable installation, next
to it.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

_PACKAGE = Path(__file__).parents[1]
_LENGTH = 150  # characters of a summary


@dataclass(frozen=True)
class Shipped:
    """A file in recipes/.

    Attributes:
        name: The name of a recipe, without its suffix; of a script for training or a notebook, its path in the folder.
        path: The file.
        summary: The first sentence of its head comment, its docstring or, without the title, its first cell.
    """

    name: str
    path: Path
    summary: str

    @property
    def text(self) -> str:
        """The file's text."""
        return self.path.read_text(encoding="utf-8")


@cache
def shipped() -> Mapping[str, Shipped]:
    """Every recipe, script and notebook, by name; the recipes first."""
    folder = next((f for f in (_PACKAGE / "recipes", _PACKAGE.parent / "recipes") if f.is_dir()), _PACKAGE)
    recipes = [(path.stem, path) for path in sorted(folder.glob("*.yml"))]
    scripts = [(path.relative_to(folder).as_posix(), path) for path in sorted(folder.glob("training/*.py"))]
    notebooks = [(path.name, path) for path in sorted(folder.glob("*.ipynb"))]
    return {name: Shipped(name, path, _summary(path)) for name, path in recipes + scripts + notebooks}


def recipe_names() -> list[str]:
    """The names of the recipes, without scripts and notebooks."""
    return [name for name, entry in shipped().items() if entry.path.suffix == ".yml"]


def _summary(path: Path) -> str:
    """The first sentence that a file says about itself."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        paragraph = (ast.get_docstring(ast.parse(text)) or "").split("\n\n")[0]
    elif path.suffix == ".ipynb":
        paragraph = "".join(json.loads(text)["cells"][0]["source"]).split("\n\n")[1]
    else:
        lines = []
        for line in text.splitlines():
            if not line.removeprefix("#").strip() or not line.startswith("#"):
                break
            lines.append(line.removeprefix("#").strip())
        paragraph = " ".join(lines)
    sentence = " ".join(paragraph.split()).split(". ")[0].rstrip(".")
    if len(sentence) > _LENGTH:  # its first clauses
        ends = [sentence.rfind(mark, 0, _LENGTH) for mark in ("; ", ": ", ", ")]
        sentence = sentence[: next((end for end in ends if end > _LENGTH // 2), max(ends))]
    return sentence
