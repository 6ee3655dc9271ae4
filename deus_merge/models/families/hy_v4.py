"""Hunyuan 4: latent attention with gates, experts, several residual streams to which each half adds."""

from ..family import Family, Sublayer
from ._pieces import gated, mixer, mlp, norm, router, stacked_experts

N2 = norm("n2", "post_attention_layernorm")
SUBLAYERS = (
    (
        Sublayer(
            "latent attention",
            (
                *norm("n1", "input_layernorm"),
                *mixer("hc_pre.", "self_attn.", writers=("self_attn.o_proj.weight", "self_attn.o_proj.bias")),
            ),
        ),
    ),
    (
        Sublayer("mlp", (*N2, *mlp(gated("mlp", "linear_gate")))),
        Sublayer(
            "experts",
            (
                *N2,
                *router(bias="mlp.gate.e_score_correction_bias"),
                *stacked_experts("mlp.experts.gate_up_proj", "mlp.experts.down_proj"),
                *mlp(gated("mlp.shared_experts", "linear_gate"), prefix="shared."),
            ),
        ),
    ),
)
FAMILY = Family("hy_v4", ("hy_v4",), SUBLAYERS)
