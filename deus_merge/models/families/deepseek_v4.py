"""DeepSeek-V4: compressed attention, experts that some layers choose by token, several residual streams that each layer
mixes."""

from ..family import Family, Sublayer
from ..spec import TensorSpec
from ._pieces import experts, gated, mixer, mlp, norm, router

EXPERTS = experts(gated("ffn.experts.{e}", "w1", "w3", "w2"))
SUBLAYERS = (
    (
        Sublayer(
            "attention",
            (
                *norm("n1", "attn_norm"),
                *mixer("hc_attn_", "attn.", writers=("attn.wo_b.weight",)),
            ),
        ),
    ),
    (
        Sublayer(
            "experts",
            (
                *norm("n2", "ffn_norm"),
                TensorSpec("hc_ffn_*", "hc_ffn_*", opaque=True, optional=True),
                TensorSpec("by_token", "ffn.gate.tid2eid", opaque=True, optional=True),
                *router("ffn.gate.weight", bias="ffn.gate.bias"),
                *EXPERTS,
                *mlp(gated("ffn.shared_experts", "w1", "w3", "w2"), prefix="shared."),
            ),
        ),
    ),
)
FAMILY = Family(
    "deepseek_v4", ("deepseek_v4",), SUBLAYERS, after=("model.norm.weight", "head.weight"), tied=("head.weight",),
    other_names={"model.embed_tokens.weight": "embed.weight"},
    without={"experts": "some layers choose experts by the number of the token"},
    no_identity="every layer mixes the residual streams with each other", unchecked=("neurons",),
)  # fmt: skip
