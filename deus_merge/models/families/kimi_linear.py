"""Kimi Linear: delta attention and latent attention, experts with a correction bias, dense layers first."""

from ..family import Family, Sublayer
from ._pieces import experts, gated, mixer, mlp, norm, router
from .deepseek_v3 import LATENT_ATTENTION, N1, WITHOUT

N2 = norm("n2", "post_attention_layernorm")
MODULE = "block_sparse_moe"
SUBLAYERS = (
    (*LATENT_ATTENTION, Sublayer("delta attention", (*N1, *mixer("self_attn.", writers=("self_attn.o_proj.weight",))))),
    (
        Sublayer("mlp", (*N2, *mlp())),
        Sublayer("mlp", (*N2, *mlp(gated(MODULE)))),
        Sublayer(
            "experts",
            (
                *N2,
                *router(f"{MODULE}.gate.weight", bias=f"{MODULE}.gate.e_score_correction_bias"),
                *experts(gated(MODULE + ".experts.{e}", "w1", "w3", "w2")),
                *mlp(gated(f"{MODULE}.shared_experts"), prefix="shared."),
            ),
        ),
    ),
)
FAMILY = Family("kimi_linear", ("kimi_linear",), SUBLAYERS, without=WITHOUT, unchecked=("value_heads",))
