"""What the benchmark compares: each init is a recipe, run by deus_merge itself.

An init that is no recipe (weights drawn at random) edits the new layers of one that is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from deus_merge import api
from deus_merge.core.located import locate
from deus_merge.recipe.reader import recipe_from
from deus_merge.recipe.types import Recipe

Build = Callable[[str, object], Recipe]
#: (deeper model, indices of its new layers, calibration windows (w, t), generator): changes the new layers in place
Edit = Callable[[torch.nn.Module, Sequence[int], torch.Tensor, torch.Generator], None]
_OUTPUTS = ("o_proj", "down_proj")
_FEATURES = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")


@dataclass(frozen=True)
class Init:
    """How new layers begin.

    Attributes:
        summary: What a new layer is, in a few words.
        build: (model folder, insert) -> recipe.
        edit: What no recipe says.
        ours: It aligns layers, or is a lead of the search: no peer.
        repeats: It repeats a block of layers and cannot take places one by one.
    """

    summary: str
    build: Build
    edit: Edit | None = None
    ours: bool = False
    repeats: bool = False


def new_positions(model: str, insert: object) -> tuple[int, ...]:
    """Where the new layers of an ``insert`` are in the deeper model."""
    return api.plan(api.upscale_recipe(model, preset="copy_next", insert=insert)).new_layers


def preset(name: str, **parameters: object) -> Build:
    """A preset of deus_merge, with parameters on top of its own."""
    return lambda model, insert: api.upscale_recipe(model, preset=name, insert=insert, parameters=parameters)


def _repeated(name: str) -> Build:
    def build(model: str, insert: object) -> Recipe:
        count = len(new_positions(model, insert))
        form = {"count": count + count % 2} if name == "solar" else {"count": count, "where": "top"}
        return api.upscale_recipe(model, preset=name, insert=form)

    return build


def _copies(new: Mapping[str, float], above: Mapping[str, float] | None = None) -> Build:
    """Copies of the upper neighbour by mergekit's ``passthrough``, with factors of some weights of the copy, and of the
    neighbour itself."""

    def build(model: str, insert: object) -> Recipe:
        plan = api.plan(api.upscale_recipe(model, preset="copy_next", insert=insert))
        slices, layer = [], 0
        for position in range(plan.num_layers):
            is_new, is_above = position in plan.new_layers, position - 1 in plan.new_layers
            factors = new if is_new else (above or {}) if is_above else {}
            source: dict[str, object] = {"model": model, "layer_range": [layer, layer + 1]}
            if factors:
                scale = [*({"filter": name, "value": value} for name, value in factors.items()), {"value": 1.0}]
                source["parameters"] = {"scale": scale}
            slices.append({"sources": [source]})
            layer += not is_new
        return recipe_from(locate({"merge_method": "passthrough", "slices": slices}))

    return build


def _scaled(names: Sequence[str], factor: float) -> dict[str, float]:
    return dict.fromkeys(names, factor)


def _random(model: torch.nn.Module, new: Sequence[int], windows: torch.Tensor, generator: torch.Generator) -> None:
    """Matrices that are not zero are drawn anew, at the mean size of what they replace."""
    for layer in new:
        for parameter in model.model.layers[layer].parameters():
            if parameter.ndim == 2 and parameter.any():
                parameter.data.normal_(0.0, float(parameter.data.std()), generator=generator)


_ZERO = _scaled(_OUTPUTS, 0.0)
_FLOW = {"alignment": "transport_flow", "restore_norm": "none"}

INITS: Mapping[str, Init] = {
    "copy_prev": Init("copy of the layer below, outputs zero (LLaMA Pro)", preset("llama_pro")),
    "copy_next": Init("copy of the layer above, outputs zero", preset("copy_next")),
    "copy_next_halved": Init(
        "copy of the layer above, q k v gate up halved, outputs zero", _copies(_ZERO | _scaled(_FEATURES, 0.5))
    ),
    "average_zero": Init("mean of the neighbours, outputs zero", preset("average_zero")),
    "average": Init("mean of the neighbours, outputs kept", preset("average")),
    "random_zero": Init("random at the neighbour's scale, outputs zero", preset("copy_next"), _random),
    "outputs_0.05": Init("copy of the layer above, outputs times 0.05", _copies(_scaled(_OUTPUTS, 0.05))),
    "outputs_0.1": Init("copy of the layer above, outputs times 0.1", _copies(_scaled(_OUTPUTS, 0.1))),
    "outputs_0.3": Init("copy of the layer above, outputs times 0.3", _copies(_scaled(_OUTPUTS, 0.3))),
    "split": Init(
        "the layer above twice, outputs of both halved",
        _copies(_scaled(_OUTPUTS, 0.5), _scaled(_OUTPUTS, 0.5)),
    ),
    "lesa": Init("predicted from all layers (LESA), outputs kept", preset("lesa")),
    "lesa_zero": Init("predicted from all layers (LESA), outputs zero", preset("lesa", zero_init=True)),
    "solar": Init("the middle layers twice", _repeated("solar"), repeats=True),
    "stack": Init("the top layers twice", _repeated("stack"), repeats=True),
    "script": Init("transport_flow as the authors' script", preset("opt_deus_script"), ours=True),
    "paper": Init("transport_flow as the paper's text: barycentric, reg 0.06", preset("opt_deus_paper"), ours=True),
    "flow_reg_0.06": Init(
        "transport_flow, unit rows, cost / max, reg 0.06", preset("opt_deus", **_FLOW, reg=0.06), ours=True
    ),
    "flow_reg_0.02": Init(
        "transport_flow, unit rows, cost / max, reg 0.02", preset("opt_deus", **_FLOW, reg=0.02), ours=True
    ),
    "flow_reg_0.005": Init(
        "transport_flow, unit rows, cost / max, reg 0.005", preset("opt_deus", **_FLOW, reg=0.005), ours=True
    ),
    "flow_restored": Init(
        "transport_flow, unit rows, reg auto, row norms restored",
        preset("opt_deus", alignment="transport_flow", restore_norm="row"),
        ours=True,
    ),
    "symmetry": Init("symmetry, mean", preset("opt_deus", alignment="symmetry", restore_norm="none"), ours=True),
    "opt_deus": Init(
        "our default: symmetry, mean, row norms restored",
        preset("opt_deus"),
        ours=True,
    ),
    "symmetry_partial": Init(
        "symmetry, the best quarter of neurons and groups fused; B elsewhere",
        preset("opt_deus", alignment="symmetry", restore_norm="row", match="partial", match_fraction=0.25),
        ours=True,
    ),
}
