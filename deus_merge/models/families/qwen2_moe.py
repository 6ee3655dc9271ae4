"""Qwen1.5-MoE and Qwen2-MoE: Qwen2 with experts and a gated expert that every token takes, in some layers or all."""

from ..family import Family, Sublayer
from ._pieces import attention, experts, mlp, norm, router, shared_expert

N2 = norm("n2", "post_attention_layernorm")
SHARED = shared_expert(gate="mlp.shared_expert_gate.weight")
SUBLAYERS = (
    (Sublayer("attention", (*norm("n1", "input_layernorm"), *attention(biases="q k v"))),),
    (Sublayer("mlp", (*N2, *mlp())), Sublayer("experts", (*N2, *router(), *experts(), *SHARED))),
)
FAMILY = Family("qwen2_moe", ("qwen2_moe",), SUBLAYERS, rotary="phases", unchecked=("neurons.shared",))
