"""References to models in recipes: text, or one of mergekit's long forms."""

from __future__ import annotations

import os

from ..checkpoint.hub import split_adapter
from ..core.located import Located
from ..models.reference import ModelRef

#: The recipe that a run writes to its output: expanded to slices, with paths that this file is the start of.
WRITTEN = "deus_merge.yml"
#: The recipe as its user wrote it, next to that one.
ORIGINAL = "deus_merge.original.yml"
_A_MODEL = "a folder or org/name[@revision], or an address, and perhaps +adapter"


def read_model(node: Located) -> ModelRef:
    """A reference to a model; mergekit's long forms are shortened.

    Raises:
        RecipeError: none of the forms.
    """
    architecture = None
    if isinstance(node.value, dict) and (place := node.value.get("override_architecture")) is not None:
        architecture = place.string("the name of a class, like LlamaForCausalLM") if place.value is not None else None
    return ModelRef.of(_text(node), node, architecture)


def from_file(path: str, file: str | None) -> str:
    """A path of a recipe. In the recipe beside an output, one that begins with ``../`` or ``./`` is relative to the
    output's folder; in all others it is relative to the working directory.

    Args:
        path: The path, or a model's reference.
        file: The recipe's file.
    """
    if not path.startswith(("../", "./")) or not file or os.path.basename(file) != WRITTEN:
        return path
    return os.path.normpath(os.path.join(os.path.dirname(os.path.abspath(file)), path))


def _text(node: Located) -> str:
    if not isinstance(node.value, dict):
        parts = split_adapter(node.string(_A_MODEL))
        return "+".join(from_file(part, node.file) for part in parts if part is not None)
    if "model" in node.value:
        parts = node.mapping(("model", "lora", "override_architecture"), "a model reference")
        adapter = parts.get("lora", Located(None))
        return _text(parts["model"]) + (f"+{_text(adapter)}" if adapter.value is not None else "")
    parts = node.mapping(("path", "revision"), "a model reference")
    if "path" not in parts:
        node.fail("a model reference needs a path", expected="path: a folder or org/name")
    revision = parts.get("revision", Located(None))
    at = f"@{revision.string('a branch, tag or commit')}" if revision.value is not None else ""
    return from_file(parts["path"].string("a folder or org/name"), parts["path"].file) + at
