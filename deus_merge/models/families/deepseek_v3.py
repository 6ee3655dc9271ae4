"""DeepSeek 2 to 3.2 and Kimi K2: latent attention, perhaps with an indexer; experts in groups, dense layers first."""

from ..family import Case, Family, Sublayer
from ._latent import direct_latent_attention, latent_attention
from ._pieces import UNKNOWN_GROUPS, mlp_or_experts, norm

N1 = norm("n1", "input_layernorm")
LATENT_ATTENTION = (
    Sublayer("latent attention", (*N1, *latent_attention())),
    Sublayer("latent attention", (*N1, *direct_latent_attention())),
)
SUBLAYERS = (LATENT_ATTENTION, mlp_or_experts(norm("n2", "post_attention_layernorm"), biases="gate up down"))
CASES = (Case("n_group", UNKNOWN_GROUPS, when=False),)
WITHOUT = {"rotary": "all heads share the rotary components of keys"}
FAMILY = Family(
    "deepseek_v3", ("deepseek_v2", "deepseek_v3", "deepseek_v32", "kimi_k2"), SUBLAYERS, without=WITHOUT,
    cases=CASES, unchecked=("value_heads",),
)  # fmt: skip
