"""Manifests of formats 1 and 2 in the words of format 3."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

#: the ``kind`` of a layer -> its actions
_ACTIONS = {
    "copy": ["copy"],
    "copy, zeroed": ["copy", "zeros"],
    "derived": ["derive"],
    "cast": ["cast"],
    "merged": ["compute"],
    "fused": ["compute"],
}


def upgraded(data: Mapping[str, Any]) -> Mapping[str, Any]:
    """A manifest's JSON data in the words of format 3.

    Formats 1 and 2 say ``cast`` also where a tensor was derived in the same dtype: it stays ``cast``. Format 1 lacks
    ``weights`` and ``layer_lists``. The model card has a checksum in both. Malformed parts stay as they are.

    Args:
        data: Of any format; it is not changed.
    """
    if data.get("format") == 1:
        data = {"layer_lists": [], "weights": {}, **data}
    if data.get("format") not in (1, 2):
        return data
    data = {**data, "layers": _layers(data.get("layers"))}
    if isinstance(modules := data.get("modules"), dict):
        data["modules"] = {name: _with_layers(module) for name, module in modules.items()}
    if isinstance(documents := data.get("documents"), list):
        data["documents"] = [_with_layers(document) for document in documents]
    if isinstance(tensors := data.get("tensors"), dict):
        data["tensors"] = {name: _tensor(tensor) for name, tensor in tensors.items()}
    if isinstance(files := data.get("files"), dict):
        data["files"] = {name: digest for name, digest in files.items() if name != "README.md"}
    return data


def _with_layers(part: Any) -> Any:
    return {**part, "layers": _layers(part.get("layers"))} if isinstance(part, dict) else part


def _layers(layers: Any) -> Any:
    return [_layer(layer) for layer in layers] if isinstance(layers, list) else layers


def _layer(layer: Any) -> Any:
    if not isinstance(layer, dict) or not isinstance(kind := layer.get("kind"), str):
        return layer
    others = {key: value for key, value in layer.items() if key != "kind"}
    return {"actions": _ACTIONS.get(kind, [kind]), "diagnostics": [], **others}


def _tensor(tensor: Any) -> Any:
    if not isinstance(tensor, dict):
        return tensor
    return {**tensor, "action": "compute"} if tensor.get("action") == "merge" else tensor
