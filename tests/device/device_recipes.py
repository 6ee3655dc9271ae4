"""Small recipes for every merge method, built from what the registries say: a new file there needs nothing here."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from deus_merge import api
from deus_merge.core.errors import DeusMergeError
from deus_merge.core.parameters import REQUIRED, Parameter
from deus_merge.core.plugins import plugins
from deus_merge.methods.base import MergeMethod
from deus_merge.methods.registry import methods
from deus_merge.recipe.reader import parse_recipe

SOLVERS = tuple(plugins("deus_merge.ot.solvers", "SOLVER"))
MERGES = sorted(name for name, method in methods().items() if not method.inserts)
INSERTS = sorted(name for name, method in methods().items() if method.inserts)

#: settings, by parameter, with which more of a method's code runs than by default
BUSY = {"density": 0.55, "gamma": 0.1, "select_topk": 0.3, "epsilon": 0.01, "scale": 0.5, "weight": 0.4, "t": 0.3}


def settings(method: MergeMethod, busy: bool) -> dict[str, Any]:
    """Values for a method's parameters: those that it requires; if ``busy``, other ones than the defaults."""

    def value(parameter: Parameter) -> Any:
        if busy and parameter.kind == "boolean":
            return not parameter.default
        if (busy or parameter.default == REQUIRED) and parameter.name in BUSY:
            return BUSY[parameter.name]
        return 0.4 if parameter.default == REQUIRED else parameter.default

    values = {p.name: value(p) for p in method.parameters}
    return {p.name: values[p.name] for p in method.parameters if values[p.name] != p.default}


def merge_recipe(name: str, models: Mapping[str, str], *, busy: bool = True, **more: Any) -> dict[str, Any]:
    """A recipe that merges as many models as a method takes, and three at most."""
    method = methods()[name]
    for others in (["one", "two"], ["one"]):
        sources = others if method.base == "required" else ["base", *others]
        recipe = {"merge_method": name, "models": [{"model": models[m]} for m in sources], **more}
        if method.base != "ignored":
            recipe["base_model"] = models["base"]
        if parameters := settings(method, busy):
            recipe["parameters"] = parameters
        if name == "passthrough":
            recipe["models"] = recipe["models"][:1]
        if _can_be_planned(recipe):
            return recipe
    raise AssertionError(f"no recipe for {name}: give its required parameters a value in BUSY")


def _can_be_planned(recipe: Mapping[str, Any]) -> bool:
    try:
        api.plan(parse_recipe(json.dumps(recipe)))
    except DeusMergeError:
        return False
    return True


def insert_recipe(name: str, model: str, layers: int = 2, **parameters: Any) -> dict[str, Any]:
    """A recipe that fills the gaps between the first layers of a model with new layers."""
    source = {"model": model, "layer_range": [0, layers]}
    return {"base_model": model, "slices": [{"merge_method": name, "sources": [source], "parameters": parameters}]}


def aligned_recipe(name: str, models: Mapping[str, str], align: str) -> dict[str, Any]:
    """A recipe that merges one layer of two models after one was aligned to the other."""
    return {
        "base_model": models["base"],
        "merge_method": name,
        "parameters": settings(methods()[name], busy=True),
        "slices": [{"align": align, "sources": [{"model": models[m], "layer_range": [1, 2]} for m in ("base", "one")]}],
    }
