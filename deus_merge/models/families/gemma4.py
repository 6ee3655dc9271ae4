"""Gemma 4: norms behind attention and MLP; a scalar on each layer; heads of two sizes; experts beside the MLP."""

from ..family import Family, Sublayer
from ..spec import RESIDUAL, TensorSpec
from ._pieces import HEAD_NORMS, attention, mlp, norm, norm_behind, router, stacked_experts


def _attention(kind: str, without: tuple[str, ...] = ()) -> Sublayer:
    """Attention that lacks v where the keys are the values, and k as well where it reads another layer's."""
    own = (s for s in attention(biases="q k v o", head_norms=HEAD_NORMS) if s.role[0] not in without)
    return Sublayer(kind, (*norm("n1", "input_layernorm"), *own, *norm_behind("o", "post_attention_layernorm")))


_MLP = (*norm("n2", "pre_feedforward_layernorm"), *mlp())
_LAST = "post_feedforward_layernorm"
_EXPERTS = (
    TensorSpec("router_norm", "router.scale", None, RESIDUAL),
    *router("router.proj.weight", norm="router_norm"),
    TensorSpec("router_scale", "router.per_expert_scale", None, "experts", follows="router", multiplies=True),
    *norm("n3", "pre_feedforward_layernorm_2"),
    *stacked_experts("experts.gate_up_proj", "experts.down_proj", norm="n3"),
    *norm_behind("experts.down", "post_feedforward_layernorm_2"),
    TensorSpec("sum_norm", f"{_LAST}.weight", None, RESIDUAL, follows="experts.down", multiplies=True),
)
_INPUTS = (
    TensorSpec("input_gate", "per_layer_input_gate.weight", RESIDUAL, "inputs"),
    TensorSpec("input_projection", "per_layer_projection.weight", "inputs", RESIDUAL),
    *norm_behind("input_projection", "post_per_layer_input_norm"),
)
SUBLAYERS = (
    (_attention("attention"), _attention("attention, k = v", ("v",)), _attention("shared attention", ("k", "v"))),
    (
        Sublayer("mlp", (*_MLP, *norm_behind("down", _LAST))),
        Sublayer("mlp + experts", (*_MLP, *norm_behind("down", f"{_LAST}_1"), *_EXPERTS)),
    ),
    (Sublayer("", ()), Sublayer("inputs", _INPUTS)),
    (Sublayer("", (TensorSpec("layer_scalar", "layer_scalar", one=True),)),),
)
FAMILY = Family(
    "gemma4",
    ("gemma4_text",),
    SUBLAYERS,
    rotary="signs",
    unchecked=("query_heads", "key_heads", "value_heads", "neurons"),
)
