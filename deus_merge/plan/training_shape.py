"""The shape of a model as training sees it: of a plan's output, or of a checkpoint."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING

from ..core.tensors import StoredTensor
from ..core.units import FLOAT_DTYPES
from ..methods.base import OutputTensor
from ..models.config_json import Config, section
from ..models.head_layout import hidden_size, layer_heads, stated_count
from ..models.source import SourceModel
from ..models.spec import TensorSpec
from .activations import LayerShape, Weight
from .training_memory import ModelShape

if TYPE_CHECKING:
    from .types import Plan

#: the keys of config.json for the number of experts that a token takes
_CHOSEN = (
    "num_experts_per_tok", "num_experts_per_token", "experts_per_token", "moe_topk", "moe_top_k", "moe_k",
    "top_k_experts",
)  # fmt: skip
_MANY_EXPERTS = 8  # that a token takes, where config.json does not say


def shape_of_plan(plan: Plan) -> ModelShape:
    """The shape of a plan's output.

    Args:
        plan: The plan.
    """
    main = set(map(id, plan.main_blocks))
    layers: dict[int, list[Weight]] = {}
    facts, outside = {}, []
    for block, output in plan.outputs:
        weight = _weight(output.role, output, output.spec)
        if id(block) in main:
            layer = block.layers[output.slot]
            layers.setdefault(layer, []).append(weight)
            facts.setdefault(layer, (block.new, output.heads))
        else:
            outside.append(weight)
    shapes = (LayerShape(new, tuple(layers[i]), heads) for i, (new, heads) in sorted(facts.items()))
    return _model(shapes, outside, plan.config, plan.donor.view.layers_path)


def shape_of_source(source: SourceModel, new_layers: Collection[int] = ()) -> ModelShape:
    """The shape of a checkpoint.

    Args:
        source: The checkpoint.
        new_layers: The layers that are trained.
    """
    tensors, view, config = source.checkpoint.tensors, source.view, source.checkpoint.config
    layers = []
    for i, names in enumerate(view.layers):
        weights = tuple(_weight(role, tensors[name], view.spec(role, i)) for role, name in names.items())
        layers.append(LayerShape(i in new_layers, weights, layer_heads(config, view, i, source.shapes(names))))
    inside = {name for layer in view.layers for name in layer.values()}
    outside = [_weight(name, tensor) for name, tensor in tensors.items() if name not in inside]
    return _model(layers, outside, config, view.layers_path)


def _model(
    layers: Iterable[LayerShape], outside: list[Weight], config: Config, layers_path: tuple[str, ...]
) -> ModelShape:
    sizes = section(config, layers_path)
    tables = [w.shape for w in outside if len(w.shape) == 2]
    rows, columns = max(tables, default=(1, 1))
    return ModelShape(
        tuple(layers),
        tuple(outside),
        hidden_size(sizes) or max(1, columns),
        stated_count(sizes, ("vocab_size",)) or rows,
        stated_count(sizes, _CHOSEN) or _MANY_EXPERTS,
        capped=sizes.get("final_logit_softcapping") is not None,
        scores=sizes.get("attn_logit_softcapping") is not None,
    )


def _weight(role: str, tensor: StoredTensor | OutputTensor, spec: TensorSpec | None = None) -> Weight:
    codes = tensor.quantization is not None or tensor.dtype not in FLOAT_DTYPES.values()
    return Weight(role, tensor.shape, tensor.nbytes, codes, spec)
