"""What config.json says of each layer, both ways: expanded to one mapping a layer, and contracted for other layers.

Whoever changes depth or order of layers takes the facts along with the layers. What a config cannot say of the layers
of the output is an error that names its key. `facts` has the forms in which configs
speak, the rules that hold for a key (`facts.by_key`) and those of single families (`facts.implied`).
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any

from ..core.errors import PlanError
from .config_json import Config, section, with_section
from .facts import features, quantization
from .facts.base import Changes, Pinned, Rule, Scope, Unsayable, Use, changed, path
from .facts.by_key import BY_KEY, SLIDING, looks_like_layers
from .facts.implied import IMPLIED
from .facts.text_types import names_of_type
from .facts.ties import Pin, check_pinned
from .family import families
from .stacks import DEPTH_LISTS, depth_at, implied_depths, is_vision_or_audio, same_depths

#: the facts of one layer: their values by their names; values are JSON values and can be compared
LayerFacts = Mapping[str, Any]

#: words of old configs for kinds of layers, and today's
_OLD_WORDS = {
    "mamba": "linear_attention",
    "attention": "full_attention",
    "deepseek_sparse_attention": "indexed_attention",
    "qwen_sparse_attention": "indexed_attention",
}
_UNKNOWN = "looks as if it spoke of single layers, and it is not known how"


def expand(config: Config, layers_path: Sequence[str], model_type: str) -> list[LayerFacts]:
    """The facts of each layer of a stack.

    Args:
        config: config.json.
        layers_path: Keys that lead to the stack's depth.
        model_type: The whole model's ``model_type``.

    Returns:
        One mapping a layer, all with the same keys. A value that ties a layer to its number is `Pinned`.
    """
    depth = depth_at(config, layers_path)
    facts: dict[str, Sequence[Any]] = {}
    for place in _places(config, layers_path):
        scope = Scope(section(config, (*place, "")), config, depth)
        for rule in rules_of(scope, place, model_type):
            try:
                values = rule.expand(scope)
            except Unsayable as problem:
                values = [Pinned(i, depth, problem.reason) for i in range(depth)]
            if values is not None and facts.get(rule.fact) != values:
                facts[_qualified(rule.fact, place, layers_path)] = values
    for form in _elsewhere(layers_path):
        if (values := form.read(config, layers_path, depth)) is not None:
            facts[form.FACT] = values
    return [{name: values[i] for name, values in facts.items()} for i in range(depth)]


def contract(
    config: Config, layers_path: Sequence[str], model_type: str, facts: Sequence[LayerFacts], where: object
) -> dict[str, Any]:
    """A config for layers with these facts.

    Args:
        config: The donor's config.json.
        layers_path: Keys that lead to the stack's depth.
        model_type: The whole model's ``model_type``.
        facts: Those of each layer of the output, with all names that the donor's have.
        where: The donor, for messages.

    Returns:
        A new config with the output's depth. The keys that are there are kept where they can say the facts.

    Raises:
        PlanError: the config cannot say them; the message names the key.
    """
    own = expand(config, layers_path, model_type)
    result = copy.deepcopy(dict(config))
    if list(facts) == own:
        return result
    if len(facts) != len(own):
        result |= implied_depths(config)
    try:
        _check_given(own, facts)
        _check_windows(section(config, layers_path), own, facts)
        for place in _places(config, layers_path):
            changes = _changes(config, layers_path, place, model_type, facts)
            target = changed(section(result, (*place, "")), changes)
            result = with_section(result, (*place, ""), target)
        for form in _elsewhere(layers_path):
            if own and form.FACT in own[0]:
                for key, value in form.write(config, layers_path, [layer[form.FACT] for layer in facts]).items():
                    inside = key.endswith("_config") and key not in quantization.SECTIONS
                    result[key] = {**result[key], **value} if inside else value
        _check_said(expand(result, layers_path, model_type), facts)
    except Unsayable as problem:
        raise PlanError(
            f"config.json's {problem.key} {problem.reason}",
            where=where,
            got=f"{len(facts)} layers in place of {len(own)}" if len(facts) != len(own) else "layers in another order",
            hint="the layers of this model can be merged, but not added, removed or moved in this way",
        ) from None
    return result


def of_new_layer(facts: LayerFacts, layer: int) -> LayerFacts:
    """The facts of a new layer that is made like the layer with this number: its own results are of no use to the
    layers that use that one's."""
    own = {name: value for name, value in facts.items() if isinstance(value, Use) and value.layer == layer}
    return {**facts, **{name: Use(value.kind, None) for name, value in own.items()}}


def _changes(
    config: Config, layers_path: Sequence[str], place: tuple[str, ...], model_type: str, facts: Sequence[LayerFacts]
) -> Changes:
    """The changes to one section that holds the depth."""
    depth = depth_at(config, layers_path)
    scope = Scope(section(config, (*place, "")), config, depth)
    changes: Changes = {}
    for rule in rules_of(scope, place, model_type):
        if rule.expand(scope) is not None:
            name = _qualified(rule.fact, place, layers_path)
            values = [layer[name] if name in layer else layer[rule.fact] for layer in facts]
            changes |= rule.contract(scope, values)
    depths = (p for p in same_depths(config, layers_path) if p[-1] not in DEPTH_LISTS)
    return changes | {(p[-1],): len(facts) for p in depths if p[:-1] == place}


def _check_given(own: Sequence[LayerFacts], facts: Sequence[LayerFacts]) -> None:
    """Check that the layers of the output have the donor's facts, and the numbers that they are tied to."""
    for name in own[0] if own else ():
        if any(name not in layer for layer in facts):
            raise Unsayable(name, "is not in the config of another model that layers come from")
        check_pinned(name, [layer[name] for layer in facts])


def _check_windows(settings: Config, own: Sequence[LayerFacts], facts: Sequence[LayerFacts]) -> None:
    """Check that layers with a sliding window, of another model, find one where the donor's layers have none."""
    if any(SLIDING in layer.values() for layer in own) or not any(SLIDING in layer.values() for layer in facts):
        return
    for key, off in (("use_sliding_window", False), ("sliding_window", None)):
        if key in settings and settings[key] is off:
            raise Unsayable(key, "turns off the window that layers of another model have")


def _check_said(said: Sequence[LayerFacts], facts: Sequence[LayerFacts]) -> None:
    """Check that a new config says what it was made to say."""
    for i, (new, wanted) in enumerate(zip(said, facts, strict=True)):
        for name, value in new.items():
            if name == features.FACT:  # of several copies of a layer only the last one has its features taken
                continue
            if name not in wanted or not _same(wanted[name], value):
                raise Unsayable(name, f"would say {value!r} of layer {i}, not {wanted.get(name)!r}")


def layer_kinds(facts: Sequence[LayerFacts]) -> list[str]:
    """The facts of each layer in words, without those that all layers share: empty where all are alike."""
    first = facts[0] if facts else {}
    shown = [
        name
        for name in first
        if any(layer[name] != first[name] for layer in facts)
        and not any(isinstance(layer[name], Pinned) for layer in facts)
        and name != quantization.FACT
    ]
    return [", ".join(_in_words(name, layer[name]) for name in shown) for layer in facts]


def plain(facts: Sequence[LayerFacts]) -> dict[str, tuple[str, ...]]:
    """Facts as a manifest records them: by their names, one JSON text a layer. Those that tie layers are left out."""
    names = [name for name in (facts[0] if facts else ()) if not any(isinstance(f[name], Pinned) for f in facts)]
    return {name: tuple(json.dumps(_today(layer[name]), sort_keys=True) for layer in facts) for name in names}


def listed_keys(config: Config, layers_path: Sequence[str], facts: Sequence[LayerFacts]) -> tuple[str, ...]:
    """The facts that a list with one entry a layer says."""
    values = section(config, layers_path)
    return tuple(
        sorted(
            name
            for name in (facts[0] if facts else ())
            if isinstance(values.get(name), list)
            and len(values[name]) == len(facts)
            and all(_today(layer[name]) == _today(entry) for layer, entry in zip(facts, values[name], strict=True))
        )
    )


def rules_of(scope: Scope, place: Sequence[str], model_type: str) -> Iterator[Rule]:
    """The rules that hold for a section: its family's, those of its ``model_type``, those by key, and unknown keys."""
    kind = _kind(scope.section, place, model_type)
    family = next((f for f in families().values() if kind in f.model_types), None)
    special = {rule.fact: rule for rule in IMPLIED.get(kind, ())} | {
        rule.fact: rule for rule in (family.facts if family else ())
    }
    read = {path(key) for rule in special.values() for key in rule.keys}
    yield from special.values()
    for rule in BY_KEY:
        if rule.fact not in special and not any(path(key) in read for key in rule.keys):
            yield rule
    read |= {path(key) for rule in BY_KEY for key in rule.keys}
    known = {keys[0] for keys in read}
    for key, value in scope.section.items():
        if key not in known and looks_like_layers(key, value, scope.depth):
            yield Rule(key, (Pin(key, _UNKNOWN, lambda scope: [True] * scope.depth),))


def _kind(config: Config, place: Sequence[str], model_type: str) -> str:
    """The ``model_type`` by which the rules of a section are known."""
    names = names_of_type(config.get("model_type"), place, model_type)
    return next((name for name in names if name in IMPLIED), names[0])


def _places(config: Config, layers_path: Sequence[str]) -> list[tuple[str, ...]]:
    """The sections that hold the depth, each as the keys that lead to it; the path's own first."""
    return list(dict.fromkeys(place[:-1] for place in same_depths(config, layers_path)))


def _qualified(fact: str, place: tuple[str, ...], layers_path: Sequence[str]) -> str:
    """A fact's name; with the section's where that is not the one of the path."""
    return fact if place == tuple(layers_path[:-1]) else f"{'.'.join(place) or 'top'}.{fact}"


def _elsewhere(layers_path: Sequence[str]) -> list[ModuleType]:
    """What reads and writes layer numbers outside of the sections that hold the depth."""
    return [quantization, features] if is_vision_or_audio(layers_path) else [quantization]


def _in_words(name: str, value: Any) -> str:
    if isinstance(value, str):
        return value
    text = value.kind if isinstance(value, Use) else json.dumps(value)
    return f"{name} {text}"


def _same(wanted: Any, said: Any) -> bool:
    """Whether a new config says a value: rounding apart, and apart from the numbers of layers that others use."""
    if isinstance(wanted, float) and isinstance(said, float):
        return math.isclose(wanted, said, rel_tol=1e-12)
    if isinstance(wanted, Use) and isinstance(said, Use):
        return wanted.kind == said.kind
    return wanted == said


def alike(values: Sequence[Any]) -> bool:
    """Whether these values of a fact are one, perhaps in old and new words."""
    return all(_today(value) == _today(values[0]) for value in values)


def _today(value: Any) -> Any:
    return _OLD_WORDS.get(value, value) if isinstance(value, str) else value
