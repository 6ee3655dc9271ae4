"""DeepSeek 2 to 3.2 and Kimi K2: latent attention, perhaps with an indexer; experts in groups, dense layers first."""

from ..family import Family, Sublayer
from ._pieces import mixer, mlp_or_experts, norm

O_PROJ = ("self_attn.o_proj.weight", "self_attn.o_proj.bias")
LATENT_ATTENTION = Sublayer("latent attention", (*norm("n1", "input_layernorm"), *mixer("self_attn.", writers=O_PROJ)))
SUBLAYERS = ((LATENT_ATTENTION,), mlp_or_experts(norm("n2", "post_attention_layernorm"), biases="gate up down"))
FAMILY = Family("deepseek_v3", ("deepseek_v2", "deepseek_v3", "deepseek_v32", "kimi_k2"), SUBLAYERS)
