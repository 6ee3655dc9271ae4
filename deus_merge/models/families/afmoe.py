"""AFMoE (Trinity): norms in front and behind, attention with a gate for each of its values, experts and one for all."""

from ..family import Family, Sublayer
from ..spec import RESIDUAL, TensorSpec
from ._pieces import HEAD_NORMS, attention, mlp_or_experts, norm, norm_behind

GATE = TensorSpec("q_gate", "self_attn.gate_proj.weight", RESIDUAL, "gate_heads", norm="n1")
ATTENTION = Sublayer(
    "attention",
    (
        *norm("n1", "input_layernorm"),
        *attention(biases="q k v o", head_norms=HEAD_NORMS),
        GATE,
        *norm_behind("o", "post_attention_layernorm"),
    ),
)
KINDS = mlp_or_experts(
    norm("n2", "pre_mlp_layernorm"), gate="router.gate", bias="expert_bias", behind="post_mlp_layernorm"
)
FAMILY = Family(
    "afmoe", ("afmoe",), ((ATTENTION,), KINDS), rotary="signs",
    without={"values": "each component of what attention gives has its own gate"},
)  # fmt: skip
