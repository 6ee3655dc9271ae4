"""References to models in recipes: text, or one of mergekit's long forms."""

from __future__ import annotations

from ..core.located import Located
from ..models.reference import ModelRef

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


def _text(node: Located) -> str:
    if not isinstance(node.value, dict):
        return node.string(_A_MODEL)
    if "model" in node.value:
        parts = node.mapping(("model", "lora", "override_architecture"), "a model reference")
        adapter = parts.get("lora", Located(None))
        return _text(parts["model"]) + (f"+{_text(adapter)}" if adapter.value is not None else "")
    parts = node.mapping(("path", "revision"), "a model reference")
    if "path" not in parts:
        node.fail("a model reference needs a path", expected="path: a folder or org/name")
    revision = parts.get("revision", Located(None))
    at = f"@{revision.string('a branch, tag or commit')}" if revision.value is not None else ""
    return parts["path"].string("a folder or org/name") + at
