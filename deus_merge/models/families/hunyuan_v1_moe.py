"""Hunyuan 1 with experts: queries and keys normalised behind their rotation, experts and one that every token takes."""

from ..family import Family, Sublayer
from ._pieces import attention, mlp_or_experts, norm

HEAD_NORMS = {"q": "self_attn.query_layernorm", "k": "self_attn.key_layernorm"}
N2 = norm("n2", "post_attention_layernorm")
ATTENTION = Sublayer("attention", (*norm("n1", "input_layernorm"), *attention(biases="q k v o", head_norms=HEAD_NORMS)))
FAMILY = Family(
    "hunyuan_v1_moe", ("hunyuan_v1_moe",),
    ((ATTENTION,), mlp_or_experts(N2, gate="gate.wg", bias=None, shared="shared_mlp")),
    rotary="signs", unchecked=("neurons",),
)  # fmt: skip
