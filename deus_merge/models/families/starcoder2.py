"""StarCoder2: a Llama layer with LayerNorms, biases and an MLP without a gate."""

from ..family import Family
from ._pieces import llama_layer

SUBLAYERS = llama_layer("q k v o up down", mlp_modules={"up": "mlp.c_fc", "down": "mlp.c_proj"}, norm_bias=True)
FAMILY = Family(
    "starcoder2",
    ("starcoder2",),
    SUBLAYERS,
    after=("model.norm.weight", "model.norm.bias", "lm_head.weight"),
    rotary="phases",
)
