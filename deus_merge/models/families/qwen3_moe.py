"""Qwen3-MoE: Qwen3 with experts, a tensor for each role of each, in some layers or all."""

from ..family import Family, Sublayer
from ._pieces import HEAD_NORMS, attention, experts, mlp, norm, router

N2 = norm("n2", "post_attention_layernorm")
SUBLAYERS = (
    (Sublayer("attention", (*norm("n1", "input_layernorm"), *attention(biases="q k v o", head_norms=HEAD_NORMS))),),
    (Sublayer("mlp", (*N2, *mlp())), Sublayer("experts", (*N2, *router(), *experts()))),
)
FAMILY = Family("qwen3_moe", ("qwen3_moe",), SUBLAYERS, rotary="signs")
