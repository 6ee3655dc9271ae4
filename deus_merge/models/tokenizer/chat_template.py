"""Chat templates: by name, as text, or the most common one of the models.

``chat_templates/NAME.jinja`` are published prompt formats, in the Jinja dialect of transformers.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from ...core.errors import DeusMergeError, nearest
from ...core.located import Located
from .files import Files, as_json, content, read_json

_FOLDER = Path(__file__).parent / "chat_templates"
_FILE, _CONFIG = "chat_template.jinja", "tokenizer_config.json"


def template_names() -> tuple[str, ...]:
    """The names of templates in recipes."""
    return tuple(sorted(path.stem for path in _FOLDER.glob("*.jinja")))


def find_template(text: str, place: Located, models: Sequence[Files]) -> str | None:
    """The template that a recipe's ``chat_template`` means.

    Args:
        text: ``auto``, a name, or a template.
        place: The place in the recipe.
        models: The tokenizer files of each model.

    Returns:
        The template; None for ``auto`` when no model has one.

    Raises:
        RecipeError: neither a known name nor a valid template.
    """
    if text == "auto":
        found = [template for files in models if (template := template_of(files))]
        return Counter(found).most_common(1)[0][0] if found else None
    if "{{" in text or "{%" in text:
        _check(text, place)
        return text
    names = template_names()
    if text not in names:
        place.fail(
            "not a chat template",
            expected=f"auto, {', '.join(names)}, or a Jinja template",
            hint=nearest(text, ("auto", *names)),
        )
    return (_FOLDER / f"{text}.jinja").read_text(encoding="utf-8")


def template_of(files: Files) -> str | None:
    """A model's (default) chat template, stripped; None where it has none or an unreadable one."""
    try:
        if _FILE in files:
            found = content(files[_FILE]).decode()
        elif _CONFIG in files:
            found = read_json(files[_CONFIG], _CONFIG).get("chat_template")
        else:
            return None
    except (ValueError, DeusMergeError):
        return None
    if isinstance(found, list):  # several, by name
        named = [t for t in found if isinstance(t, dict) and t.get("name") == "default"]
        found = named[0].get("template") if named else None
    return found.strip() or None if isinstance(found, str) and _is_text(found) else None


def set_template(files: Files, template: str) -> dict[str, bytes | Path]:
    """An output's files with this template, which replaces all others."""
    files = {name: file for name, file in files.items() if name != "chat_template.json"}
    files[_FILE] = template.encode()
    if _CONFIG in files:
        data = read_json(files[_CONFIG], _CONFIG)
        if data.pop("chat_template", None) is not None:
            files[_CONFIG] = as_json(data, indent=2)
    return files


def _is_text(template: str) -> bool:
    """Whether it has no lone surrogates, which cannot be encoded."""
    return not any("\ud800" <= c <= "\udfff" for c in template)


def _check(template: str, place: Located) -> None:
    """Raise a RecipeError unless Jinja with the extensions of transformers can read the template."""
    import jinja2

    if not _is_text(template):
        place.fail("the text has a lone surrogate", expected="text that can be encoded")
    plain = re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", template)
    try:
        jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(plain)
    except jinja2.TemplateSyntaxError as error:
        place.fail("not a Jinja template", expected="auto, a name, or a Jinja template", got=error.message)
