"""Llama 4: adjacent components are rotary pairs; experts in 3-D tensors stored as (inputs, outputs), one more for every
token, and dense layers between."""

from ..family import Family, Sublayer
from ._pieces import attention, gated, mlp, norm, router, stacked_experts

N2 = norm("n2", "post_attention_layernorm")
SUBLAYERS = (
    (Sublayer("attention", (*norm("n1", "input_layernorm"), *attention(biases="q k v o"))),),
    (
        Sublayer("mlp", (*N2, *mlp(gated("feed_forward")))),
        Sublayer(
            "experts",
            (
                *N2,
                *router("feed_forward.router.weight"),
                *stacked_experts(
                    "feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj", transposed=True
                ),
                *mlp(gated("feed_forward.shared_expert"), prefix="shared."),
            ),
        ),
    ),
)
FAMILY = Family("llama4", ("llama4_text",), SUBLAYERS, rotary="phases", interleaved=True, unchecked=("neurons",))
