"""What a manifest must look like before its parts are used: somebody else may have written it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path


def _text(value: object) -> bool:
    return isinstance(value, str)


def _count(value: object) -> bool:
    """Of layers and the like: small enough to be counted through."""
    return type(value) is int and 0 <= value < 100_000


def _size(value: object) -> bool:
    return type(value) is int and value >= 0


def _truth(value: object) -> bool:
    return isinstance(value, bool)


def _text_or_nothing(value: object) -> bool:
    return value is None or isinstance(value, str)


def _mapping(value: object) -> bool:
    return isinstance(value, dict)


class _Each(dict):
    """A mapping with keys of the file's own, all of whose values are alike."""


#: A key with a question mark may be missing: format 1 had fewer, and some are there only when needed.
_SHAPE = {
    "plan_hash": _text,
    "deus_merge": _text,
    "versions": _Each(any=_text),
    "options": {"device": _text, "threads": _count},
    "donor": _count,
    "sources": [{"model": _text, "fingerprint": _text, "folder?": _text, "layers?": _count}],
    "num_layers": _count,
    "function_preserving": _truth,
    "new_layers": [_count],
    "new_parameters": [_text],
    "layers": [
        {
            "layer": _count,
            "new": _truth,
            "actions": [_text],
            "method": _text,
            "sources": [{"model": _text, "layer": _count}],
            "diagnostics?": [{"role": _text, "queries?": [_count]}],
        }
    ],
    "tensors": _Each(any={"action": _text, "model?": _count, "tensor?": _text, "dtype?": _text, "shape?": [_size]}),
    "files": _Each(any=_text),
    "warnings": [_text],
    "layer_prefix?": _text,
    "layer_lists?": [_text],
    "dtype?": _text_or_nothing,
    "donor_config?": _mapping,
    "weights?": _Each(any={"bytes": _size, "header_sha256": _text}),
    "lineage?": [_mapping],
}


def problem(manifest: Mapping) -> str | None:
    """What is wrong with a manifest's parts; None when nothing is."""
    if misfit := _misfit(manifest, _SHAPE, ""):
        return misfit
    sources = manifest["sources"]
    depths = {source["model"]: source.get("layers", 100_000) for source in sources}
    if manifest["donor"] >= len(sources):
        return "donor is none of the sources"
    for entry in manifest["layers"]:
        if not entry["sources"] or any(s["layer"] >= depths.get(s["model"], 0) for s in entry["sources"]):
            return f"layer {entry['layer']} comes from no source"
    for name, origin in manifest["tensors"].items():
        model = origin.get("model", len(sources))
        copies = "tensor" in origin and model < len(sources) and "folder" in sources[model]
        if origin["action"] == "copy" and not copies:
            return f"tensors: {name!r} is a copy of nothing"
    strange = [name for name in manifest["files"] if Path(name).name != name]
    return f"files: {strange[0]!r}" if strange else None


def _misfit(value: object, shape: Mapping | list | Callable, place: str) -> str | None:
    """The first place at which a value has not the shape."""
    if not isinstance(shape, dict | list):
        return None if shape(value) else place
    if not isinstance(value, list if isinstance(shape, list) else dict):
        return place
    if isinstance(shape, list):
        parts = [(f"{place}[{i}]", item, shape[0]) for i, item in enumerate(value)]
    elif isinstance(shape, _Each):
        parts = [(f"{place}.{key}", item, shape["any"]) for key, item in value.items()]
    else:
        names = {key.removesuffix("?"): part for key, part in shape.items()}
        if missing := [key for key in shape if not key.endswith("?") and key not in value]:
            return f"{place}.{missing[0]} is missing".lstrip(".")
        parts = [(f"{place}.{name}".lstrip("."), value[name], part) for name, part in names.items() if name in value]
    return next((found for where, item, part in parts if (found := _misfit(item, part, where))), None)
