"""GLM-4.5 and 4.6: attention with norms of queries and keys or without; experts with correction biases, and
one that every token takes; dense layers first."""

from ..family import Family, Sublayer
from ._pieces import HEAD_NORMS, attention, mlp_or_experts, norm

N1, N2 = norm("n1", "input_layernorm"), norm("n2", "post_attention_layernorm")
ATTENTION_KINDS = (
    Sublayer("attention", (*N1, *attention(biases="q k v o", head_norms=HEAD_NORMS))),
    Sublayer("attention", (*N1, *attention(biases="q k v o"))),
)
FAMILY = Family(
    "glm4_moe", ("glm4_moe", "glm4v_moe_text"), (ATTENTION_KINDS, mlp_or_experts(N2)), rotary="signs",
    rotary_share=0.5,
)  # fmt: skip
