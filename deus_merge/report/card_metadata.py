"""The front matter of a model card: what the hub reads of it. Much is inherited from the cards of the sources.

Reference: hub-docs, docs/hub/model-cards.md and modelcard.md. ``base_model`` takes ids of the hub alone, so a local
model whose id is not known is named in the card's text, not there.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from ..checkpoint.header import read_small
from ..checkpoint.hub import repository_of, split_adapter
from ..core.errors import DeusMergeError
from ..models.config_json import class_names
from ..models.source import SourceModel
from ..plan.documents import PlannedResult
from ..plan.types import Plan
from .manifest import MANIFEST
from .shareable import hub_id_of, shared_name

CARD = "README.md"
#: What the hub takes as ``base_model_relation``.
RELATIONS = ("adapter", "finetune", "merge", "quantized")
_FRONT = re.compile(r"\A\ufeff?---[ \t]*\r?\n(.*?)^---[ \t]*(?:\r?\n|\Z)", re.DOTALL | re.MULTILINE)
_LONGEST = 200  # characters of a value that is inherited
_MOST = 100  # values of a list
#: Tags that the hub makes itself, of one repository.
_OWN_TAGS = ("base_model:", "license:", "region:", "dataset:", "arxiv:", "doi:", "autotrain", "endpoints_compatible")


def split_card(text: str) -> tuple[dict[str, Any], str]:
    """A card's front matter and its Markdown. A front matter that is not valid YAML counts as none."""
    match = _FRONT.match(text)
    if match is None:
        return {}, text
    try:
        found = yaml.safe_load(match[1])
    except (yaml.YAMLError, ValueError, RecursionError):
        found = None
    return (found if isinstance(found, dict) else {}), text[match.end() :]


def join_card(front: Mapping[str, Any], body: str) -> str:
    """A card of its two parts."""
    return f"---\n{yaml.safe_dump(dict(front), sort_keys=False, allow_unicode=True)}---\n\n{body.lstrip()}"


def card_of(folder: Path) -> dict[str, Any]:
    """The front matter of a model's card; nothing where there is none that can be read."""
    path = folder / CARD
    try:
        return split_card(read_small(path).decode("utf-8", "replace"))[0] if path.is_file() else {}
    except DeusMergeError:
        return {}


def _card(model: SourceModel) -> dict[str, Any]:
    """The front matter of the card of a source; that of a model on another machine was fetched with its other files."""
    if folders := model.checkpoint.folders:
        return card_of(folders[0])
    file = model.checkpoint.side_files.get(CARD)
    try:
        return split_card(file.decode("utf-8", "replace"))[0] if isinstance(file, bytes) else {}
    except DeusMergeError:
        return {}


def sources_of(plan: Plan) -> list[SourceModel]:
    """The models that an output was made from, its donor first; for a document, the models that were used in it."""
    plans = (plan, *(document.plan for document in plan.documents))
    found = {str(m.ref): m for part in plans for m in part.models if not isinstance(m.checkpoint, PlannedResult)}
    return list(found.values())


def front_matter(plan: Plan) -> dict[str, Any]:
    """The front matter of the card of a plan's output."""
    sources = sources_of(plan)
    cards = {str(model.ref): _card(model) for model in sources}
    donor = next(iter(cards.values()), {})
    ids = list(dict.fromkeys(part for model in sources for part in _ids(model, cards[str(model.ref)])))
    task = _text(donor.get("pipeline_tag"))
    if task is None and next(iter(class_names(plan.config)), "").endswith("ForCausalLM"):
        task = "text-generation"
    languages = [word for card in cards.values() for word in _texts(card.get("language"))]
    own = ["merge", "deus_merge", *(["depth-up-scaling"] if plan.new_layers else [])]
    tags = [tag for tag in _texts(donor.get("tags")) if not tag.startswith(_OWN_TAGS)]
    front = {
        **_license(list(cards.values()), plan, ids),
        "language": list(dict.fromkeys(languages)),
        "library_name": _text(donor.get("library_name")) or "transformers",
        "pipeline_tag": task,
        "tags": list(dict.fromkeys([*tags, *own])),
        "base_model": ids,
        "base_model_relation": "merge" if ids else None,
    }
    return {key: value for key, value in front.items() if value}


def licenses(plan: Plan) -> list[tuple[str, str]]:
    """Each source's name with its licence, where these are not one and the same known licence."""
    found = []
    for model in sources_of(plan):
        card = _card(model)
        found.append((shared_name(str(model.ref)), _said(card) or "not known"))
    words = {word for _, word in found}
    return [] if len(words) == 1 and words != {"not known"} else found


def unnamed(plan: Plan) -> list[str]:
    """The names of sources whose id on the hub is not known."""
    return [shared_name(str(m.ref)) for m in sources_of(plan) if not _ids(m, _card(m))]


def _said(card: Mapping[str, Any]) -> str | None:
    """A card's licence in words."""
    name = ", ".join(_texts(card.get("license")))
    more = _text(card.get("license_name"))
    return f"{name} ({more})" if name and more else name or None


def _license(cards: list[Mapping[str, Any]], plan: Plan, ids: list[str]) -> dict[str, Any]:
    """The licence that all sources have; nothing where they differ, or where one does not say it."""
    words = {_said(card) for card in cards}
    if len(words) != 1 or None in words:
        return {}
    said = _texts(cards[0].get("license"))
    found: dict[str, Any] = {"license": said[0] if len(said) == 1 else said}
    if found["license"] != "other":
        return found
    if name := _text(cards[0].get("license_name")):
        found["license_name"] = name
    if link := _text(cards[0].get("license_link")):
        inside = link.removeprefix("./")
        if re.match(r"https?://", link):
            found["license_link"] = link
        elif inside in plan.files:
            found["license_link"] = inside
        elif len(ids) == 1:
            found["license_link"] = f"https://huggingface.co/{ids[0]}/blob/main/{inside}"
    return found


def _ids(model: SourceModel, card: Mapping[str, Any]) -> list[str]:
    """The ids on the hub of a model and its adapter. Of a local output of this tool, those that its own card names."""
    found = []
    base, adapter = split_adapter(str(model.ref))
    for part, folder in zip((base, adapter), model.checkpoint.folders, strict=False):
        name = None if part is None else repository_of(part) or hub_id_of(folder)
        found += [name] if name else []
    if not found and MANIFEST in model.checkpoint.side_files:
        found = [name for name in _texts(card.get("base_model")) if repository_of(name) == name]
    return found


def _text(value: object) -> str | None:
    """A value of a card that is one line of text."""
    if isinstance(value, str) and 0 < len(value) <= _LONGEST and value.isprintable():
        return value
    return None


def _texts(value: object) -> list[str]:
    """The texts of a value of a card: one, or a list."""
    items: Iterable[object] = value[:_MOST] if isinstance(value, list) else [value]
    return [text for item in items if (text := _text(item)) is not None]
