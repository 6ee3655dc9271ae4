"""LFM2: short convolutions, and attention with norms of queries and keys per head, in some layers or all experts."""

from ..family import Family, Sublayer
from ._pieces import attention, experts, gated, mixer, mlp, norm, router

N1, N2 = norm("n1", "operator_norm"), norm("n2", "ffn_norm")
MODULES = {role: f"self_attn.{role}_proj" for role in "qkv"} | {"o": "self_attn.out_proj"}
HEAD_NORMS = {"q": "self_attn.q_layernorm", "k": "self_attn.k_layernorm"}
MLP = gated("feed_forward", "w1", "w3", "w2")
EXPERTS = gated("feed_forward.experts.{e}", "w1", "w3", "w2")
SUBLAYERS = (
    (
        Sublayer("attention", (*N1, *attention(MODULES, head_norms=HEAD_NORMS))),
        Sublayer("convolution", (*N1, *mixer("conv.", writers=("conv.out_proj.weight", "conv.out_proj.bias")))),
    ),
    (
        Sublayer("mlp", (*N2, *mlp(MLP))),
        Sublayer(
            "experts",
            (*N2, *router("feed_forward.gate.weight", bias="feed_forward.expert_bias"), *experts(EXPERTS)),
        ),
    ),
)
FAMILY = Family(
    "lfm2", ("lfm2", "lfm2_moe"), SUBLAYERS, rotary="signs", after=("model.embedding_norm.weight", "lm_head.weight"),
    unchecked=("neurons",),
)  # fmt: skip
