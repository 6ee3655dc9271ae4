"""Falcon-H1: attention and Mamba side by side behind one norm."""

from ..family import Family, Sublayer
from ._pieces import attention, gated, mixer, mlp, norm

MAMBA = mixer("mamba.", writers=("mamba.out_proj.weight", "mamba.out_proj.bias"))
SUBLAYERS = (
    (Sublayer("attention and mamba", (*norm("n1", "input_layernorm"), *attention(biases="q k v o"), *MAMBA)),),
    (Sublayer("mlp", (*norm("n2", "pre_ff_layernorm"), *mlp(gated("feed_forward"), biases="gate up down"))),),
)
FAMILY = Family(
    "falcon_h1", ("falcon_h1",), SUBLAYERS, rotary="phases", after=("model.final_layernorm.weight", "lm_head.weight")
)
