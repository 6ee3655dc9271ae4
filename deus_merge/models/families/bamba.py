"""Bamba and Jamba: Mamba layers with attention between, each with an MLP, in Jamba some with experts."""

from ..family import Family, Sublayer
from ._pieces import attention, experts, gated, mixer, mlp, norm, router

N1, N2 = norm("n1", "input_layernorm"), norm("n2", "pre_ff_layernorm")
SUBLAYERS = (
    (
        Sublayer("attention", (*N1, *attention(biases="q k v o"))),
        Sublayer("mamba", (*N1, *mixer("mamba.", writers=("mamba.out_proj.weight", "mamba.out_proj.bias")))),
    ),
    (
        Sublayer("mlp", (*N2, *mlp(gated("feed_forward"), biases="gate up down"))),
        Sublayer("experts", (*N2, *router("feed_forward.router.weight"), *experts(gated("feed_forward.experts.{e}")))),
    ),
)
AFTER = ("model.final_layernorm.weight", "lm_head.weight")
FAMILY = Family("bamba", ("bamba",), SUBLAYERS, rotary="phases", rotary_share=0.5, after=AFTER)
