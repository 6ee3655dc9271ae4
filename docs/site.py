"""A hook of MkDocs: the start page is the README, a guide to extensions is a part of CONTRIBUTING, and what is outside
of docs/ is named instead of linked."""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

_ROOT = Path(__file__).parents[1]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the README as the start page, and the part of CONTRIBUTING that says how to add things."""
    text = (_ROOT / "README.md").read_text(encoding="utf-8").replace("](docs/", "](")
    files.append(File.generated(config, "index.md", content=re.sub(r"\]\(([A-Z]+\.md|recipes/)", r"](../\1", text)))
    guide = (_ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").replace("](docs/", "](")
    parts = guide[guide.index("## One tensor's way") : guide.index("## Habits")]
    title = (
        "# Write a method, a family, a solver, a format\n\nA new file of one of these folders is found by itself.\n\n"
    )
    files.append(File.generated(config, "extending.md", content=title + parts))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Replace links to the README by links to the start page, and links out of docs/ by their texts."""
    markdown = markdown.replace("](../README.md", "](index.md")
    return re.sub(r"\[([^\]]+)\]\(\.\./[^)]+\)", r"\1", markdown)
