"""Writes the tree in CONTRIBUTING.md from the files' own docstrings; a test checks that it is up to date.

Run: python docs/make_tree.py
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "CONTRIBUTING.md"
BEGIN, END = "<!-- tree -->\n", "<!-- end of tree -->"
FOLDERS = {  # in the order in which imports run, from the command line down
    "cli": "the command line, the only part that prints",
    "api": "the functions for notebooks and the command line",
    "training": "the way into training, and back",
    "run": "runs a plan: checks, blocks, the finished folder",
    "verify": "checks of a finished checkpoint",
    "report": "the manifest and all that people read about an output",
    "plan": "recipe and headers -> a plan, before any tensor is read",
    "recipe": "YAML -> a frozen recipe",
    "methods": "one file a merge method",
    "align": "brings a layer into the order of another one",
    "ot": "optimal transport, usable alone",
    "models": "what a model is: families, configs, layers, tokenizers",
    "checkpoint": "files: read, planned, written, put in place",
    "core": "what everybody may import",
}
WIDTH, LENGTH = 26, 92  # characters of a name and of its description


def render() -> str:
    """The tree: one line a file, in the words of its docstring's first sentence."""
    package = ROOT / "deus_merge"
    lines = ["```", "deus_merge/", *_line(package / "__init__.py", 1)]
    for name, about in FOLDERS.items():
        lines += ["", f"  {name + '/':<{WIDTH}}{about}", *_folder(package / name, 2)]
    return "\n".join([*lines, "```", ""])


def _folder(folder: Path, depth: int) -> list[str]:
    lines = []
    files = sorted(folder.glob("*.py"), key=lambda path: (path.name != "__init__.py", path.name))
    for file in files:
        lines += _line(file, depth)
    for inner in sorted(path for path in folder.iterdir() if (path / "__init__.py").exists()):
        lines += ["  " * depth + f"{inner.name}/", *_folder(inner, depth + 1)]
    return lines


def _line(file: Path, depth: int) -> list[str]:
    """A file's line; nothing for a package without a docstring."""
    text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8")))
    if text is None:
        return []
    sentence = re.split(r"(?<=\.)\s", " ".join(text.split("\n\n")[0].split()))[0].rstrip(".")
    for mark in ("; ", ": ", ", "):  # a clause of it, where the whole sentence does not fit
        if len(sentence) > LENGTH:
            sentence = sentence[: sentence.rfind(mark, 0, LENGTH)] if mark in sentence[20:LENGTH] else sentence
    return [f"{'  ' * depth}{file.name:<{WIDTH + 2 - 2 * depth}}{sentence}"]


def with_tree(page: str) -> str:
    """The page with its tree as it should be."""
    before, rest = page.split(BEGIN)
    return before + BEGIN + render() + END + rest.split(END)[1]


if __name__ == "__main__":
    PAGE.write_text(with_tree(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
