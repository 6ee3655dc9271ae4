"""What mergekit reads of a recipe and this tool has no use for: anchors, empty keys, values without an effect; and the
recipes of mergekit's other programs.

Reference: mergekit 0.1.5, which ignores every key that it does not know.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import replace

from ..core.errors import nearest
from ..core.located import Located
from ..methods.registry import methods
from .types import Recipe

#: keys that only hold anchors for other parts of the recipe begin with one of these
PREFIXES = ("x-", ".")
#: a recipe has exactly one of these keys
FORMS = ("slices", "models", "modules", "upscale")
#: keys that mean the same with no value as when they are missing
OPTIONAL = frozenset((
    "slices", "models", "modules", "base_model", "parameters", "dtype", "out_dtype", "tokenizer_source", "tokenizer",
    "chat_template",
))  # fmt: skip
#: a key of another program's recipe -> the program, and what to do
_PROGRAMS = {
    "experts": ("mergekit-moe", "build the model with mergekit-moe; the result can be merged and made deeper here"),
    "genome": ("mergekit-evolve", "write one of its merges as a recipe, with merge_method and models"),
    "layer_slices": ("bakllama", "write slices with merge_method: passthrough"),
}


def top_level(root: Located, known: Collection[str]) -> dict[str, Located]:
    """The keys of a recipe, without those that only hold anchors and optional ones without a value.

    Args:
        root: The recipe.
        known: The keys that a recipe has.

    Raises:
        RecipeError: not a mapping, an unknown key, or a recipe of another program.
    """
    if not isinstance(root.value, dict):
        return root.mapping(known, "a recipe")
    for key, (program, instead) in _PROGRAMS.items():
        if key in root.value:
            root.value[key].fail(
                f"this is a {program} recipe; not supported here",
                expected="a recipe with slices, models, modules or upscale",
                got=f"{key}:",
                hint=f"{instead}; docs/coming-from-mergekit.md has more",
            )
    kept = {}
    given = [key for key in FORMS if key in root.value and root.value[key].value is not None]
    for key, item in root.value.items():
        if key not in known:
            if key.startswith(PREFIXES) or (item.shared and nearest(key, known) is None):
                continue
            hint = nearest(key, known) or f"the name of a key that only holds anchors begins with {PREFIXES[0]}"
            item.fail(f"unknown key {key!r}", expected=", ".join(sorted(known)), got=key, hint=hint)
        if item.value is not None or key not in OPTIONAL or (key in FORMS and not given):
            kept[key] = item
    return replace(root, value=kept).mapping(known, "a recipe")


def ignored(recipe: Recipe) -> Iterator[str]:
    """Warnings about values that have no effect, in mergekit as here."""
    for part in recipe.all_slices():
        shared = {p.name for p in methods()[part.merge_method].parameters if p.scope != "source"}
        for source in part.sources:
            for name, setting in source.parameters.items():
                if name in shared:
                    where = setting.place.where
                    yield f"{where}: ignored, since {name} is a parameter of the whole slice, not of one source"
    donor = recipe.donor
    for ref in recipe.references():
        if ref.architecture and not (ref == donor and ref.architecture == donor.architecture):
            yield (
                f"{ref.place.where}: override_architecture is ignored: only config.json of the output names a class,"
                f" and it is that of {donor}"
            )
