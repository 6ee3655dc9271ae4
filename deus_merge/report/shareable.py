"""The rule for paths in files that people share: no absolute path, and no folder above one that the output is in, too.

A source is written as ``org/name@revision`` where it lies in the hub's cache; as a path relative to the output's folder
where both lie in one folder below the root (and not above the user's home); else as `PRIVATE` and its name.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from ..checkpoint.hub import PRIVATE, split_adapter
from ..core.urls import address_of
from ..plan.types import Plan
from ..recipe.writer import as_written
from .known_sources import known_folder

_CACHED = re.compile(r"models--([^/]+?)--([^/]+)/snapshots/([0-9a-f]{40})")
_HUB = re.compile(r"([A-Za-z0-9][\w.-]*)/([\w.-]*\w)@([0-9a-f]{40})", re.ASCII)
#: An absolute path in text for people: after a space, a quote or a bracket, not inside a word or an address.
_ABSOLUTE = re.compile(r"""(?<![\w.~/])/[^\s'"`,;:()\[\]{}<>#]*[^\s'"`,;:()\[\]{}<>#.]""")
#: Parts of a manifest without a path of this machine: too large to search for nothing, or the base's own.
_PLAIN = frozenset({"tensors", "files", "weights", "layer_facts", "donor_config", "new_parameters", "versions"})


def hub_cache() -> Path:
    """The folder of the hub's cache, as huggingface_hub finds it."""
    home = os.environ.get("HF_HOME") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "huggingface"
    )
    found = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE") or os.path.join(home, "hub")
    return Path(os.path.abspath(os.path.expanduser(found)))


def shared_path(path: Path | str, folder: Path) -> str:
    """A path as files in an output's folder give it.

    Args:
        path: A folder or a file.
        folder: The output's folder, which need not exist; or its address as a path.
    """
    if str(path).startswith(PRIVATE):
        return str(path)
    elsewhere = address_of(folder) is not None
    path, folder = Path(os.path.abspath(path)), Path(os.path.abspath(folder))
    cache = hub_cache()
    if path.is_relative_to(cache) and (match := _CACHED.fullmatch(path.relative_to(cache).as_posix())):
        return f"{match[1]}/{match[2]}@{match[3]}"
    if elsewhere:  # nothing is relative to it
        return PRIVATE + path.name
    try:
        common = Path(os.path.commonpath((path, folder)))
    except ValueError:  # another drive
        return PRIVATE + path.name
    home = Path(os.path.abspath(os.path.expanduser("~")))
    if common == Path(common.anchor) or common in home.parents:
        return PRIVATE + path.name
    text = Path(os.path.relpath(path, folder)).as_posix()
    return text if text.startswith("..") else f"./{text}"


def found_path(text: str, folder: Path) -> str:
    """A path of a file in an output's folder, as this machine has it: the inverse of `shared_path`. One that is
    private, absolute, or not in the hub's cache stays as it is."""
    if text.startswith(("../", "./")) or text in ("..", "."):
        return os.path.normpath(os.path.join(os.path.abspath(folder), text))
    if match := _HUB.fullmatch(text):
        cached = hub_cache() / f"models--{match[1]}--{match[2]}" / "snapshots" / match[3]
        return str(cached) if cached.is_dir() else text
    return text


def hub_id_of(folder: Path) -> str | None:
    """The id on the hub of a folder in a cache of it; None for all others."""
    match = _CACHED.search(Path(os.path.abspath(folder)).as_posix())
    return f"{match[1]}/{match[2]}" if match else None


def shared_name(reference: str) -> str:
    """A reference to a model without folders: a local one by its name, one of the hub by its id."""
    return "+".join(_name(part) for part in split_adapter(reference) if part is not None)


def _name(part: str) -> str:
    if not (os.path.isabs(part) or os.path.exists(part)):
        return part
    path = Path(os.path.abspath(part))
    match = _CACHED.search(path.as_posix())
    return f"{match[1]}/{match[2]}@{match[3]}" if match else path.name or "model"


def recipe_paths(plan: Plan) -> list[str]:
    """The absolute paths that a plan's recipe names, and the folders that they led to."""
    plans = (plan, *(document.plan for document in plan.documents))
    models = [model for part in plans for model in part.models]
    paths = [part for model in models for part in split_adapter(str(model.ref)) if part is not None]
    paths += [str(folder) for model in models for folder in model.checkpoint.folders]
    paths += [part.recipe.calibrate.text for part in plans if part.recipe.calibrate]
    return list(dict.fromkeys(filter(os.path.isabs, paths)))


def shared_text(text: str, paths: Iterable[str] = (), name: Callable[[str], str] | None = None) -> str:
    """Text for people without absolute paths of this machine: these ones, and whatever looks like one and is here.

    Args:
        text: A recipe as its user wrote it, comments included, or a message.
        paths: Absolute paths that the text may have.
        name: What a path becomes; by default the hub's id, or `PRIVATE` and the last part of the path.
    """
    name, home = name or _private, Path(os.path.abspath(os.path.expanduser("~")))
    for path in sorted(paths, key=len, reverse=True):
        text = re.sub(rf"(?<![\w.~/-]){re.escape(path)}(?![\w-])", lambda match: name(match[0]), text)

    def found(match: re.Match) -> str:
        path = Path(match[0])
        deep = len(path.parts) > 2  # not /tmp alone
        here = path.is_relative_to(home) or os.path.lexists(path) or (len(path.parts) > 3 and path.parent.is_dir())
        return name(match[0]) if deep and here else match[0]

    text = _ABSOLUTE.sub(found, text)
    return text.replace(f"{home}/", "~/") if home.parts[1:] else text


def shared_recipe(plan: Plan) -> str:
    """A plan's recipe as its user wrote it, without absolute paths of this machine. Where they are written in a way
    that a search of the text does not find, the values are written anew, without comments."""
    text, paths = as_written(plan.recipe), recipe_paths(plan)
    shared = shared_text(text, paths)
    try:
        values = list(yaml.safe_load_all(shared))
    except yaml.YAMLError:
        return shared
    again = [_mapped(value, lambda key, text: shared_text(text, paths)) for value in values]
    if again == values:
        return shared
    return "---\n".join(yaml.safe_dump(v, sort_keys=False, allow_unicode=True) for v in again)


def _private(path: str) -> str:
    name = _name(path)
    return name if _HUB.fullmatch(name) else PRIVATE + name


def shared_manifest(data: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """A manifest's JSON data as it is written to an output's folder: `folder` and `adapter` by `shared_path`, `model`
    by `shared_name` (with a number where two sources have one name), and no folder of a source in any other text."""
    records = [*data["sources"], *(s for growth in data.get("lineage", ()) for s in growth["sources"])]
    names: dict[str, str] = {}
    for text in dict.fromkeys(record["model"] for record in records):
        name, number = shared_name(text), 2
        while name in names.values():
            name, number = f"{shared_name(text)} ({number})", number + 1
        names[text] = name
    secret = {text: name for text, name in names.items() if os.path.isabs(text)}
    for record in records:
        for place in _places(record):
            if os.path.isabs(place):
                secret.setdefault(place, shared_name(place))
    replaced = sorted(secret.items(), key=lambda item: -len(item[0]))

    def text_of(key: str, text: str) -> str:
        if key == "model":
            return names.get(text, text)
        if key in ("folder", "adapter"):
            return shared_path(text, folder)
        for path, name in replaced:
            text = text.replace(path, name)
        return shared_text(text) if key == "warnings" else text

    return _mapped(data, text_of)


def shared_record(record: Mapping[str, Any], manifest: Any, out: Path) -> dict[str, Any]:
    """JSON data about an output, for people, without absolute paths of this machine.

    Args:
        record: The data.
        manifest: The output's manifest.
        out: The output's folder, which becomes its name.
    """
    sources = [s for growth in manifest.growths for s in growth.sources]
    known = dict.fromkeys((os.path.abspath(out), os.path.realpath(out)), os.path.basename(os.path.abspath(out)))
    known |= {place: shared_name(place) for s in sources for place in _places(vars(s)) if os.path.isabs(place)}
    return _mapped(record, lambda key, text: shared_text(text, known, lambda path: known.get(path) or _private(path)))


def found_manifest(data: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """A manifest's JSON data with the folders of its sources as this machine has them."""
    found = _mapped(data, lambda key, text: found_path(text, folder) if key in ("folder", "adapter") else text)
    sources = found.get("sources")
    for record in sources if isinstance(sources, list) else ():
        place = record.get("folder") if isinstance(record, dict) else None
        if isinstance(place, str) and (place.startswith(PRIVATE) or not os.path.exists(place)):  # or it was moved
            record["folder"] = known_folder(str(record.get("contents"))) or place
    return found


def _places(record: Mapping[str, Any]) -> list[str]:
    own = [record[key] for key in ("folder", "adapter") if isinstance(record.get(key), str)]
    return own + (_places(record["base"]) if isinstance(record.get("base"), Mapping) else [])


def _mapped(value: Any, text_of: Callable[[str, str], str], key: str = "") -> Any:
    """JSON data with each text replaced, given the last key above it."""
    if isinstance(value, str):
        return text_of(key, value)
    if isinstance(value, Mapping):
        return {k: v if k in _PLAIN else _mapped(v, text_of, k) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_mapped(item, text_of, key) for item in value]
    return value
