"""What all pages share: the template of a page with its style, the formats of numbers, the explained terms."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

from .figures import FILTERS
from .terms import Glossary

if TYPE_CHECKING:
    from jinja2 import Environment


def render(template: str, values: Mapping[str, Any]) -> str:
    """A page: texts come from recipes and models that somebody else wrote, so the templates escape them all.

    Args:
        template: A file of this folder.
        values: What it shows.

    Returns:
        HTML without scripts, fonts, and links that load anything.
    """
    glossary = Glossary()
    shared = {"glossary": glossary, "term": glossary.term, "check": glossary.check, "docs": documentation()}
    return _environment().get_template(template).render({**shared, **values})


def documentation() -> str | None:
    """The address of the documentation, as the package's metadata has it; None where it has none."""
    try:
        urls = importlib.metadata.metadata("deus-merge").get_all("Project-URL") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    found = {label.strip().lower(): url.strip() for label, _, url in (line.partition(",") for line in urls)}
    address = found.get("documentation")
    return address if address and address.startswith("https://") else None


@cache
def _environment() -> Environment:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("deus_merge.report.page", "."), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= FILTERS
    return environment
