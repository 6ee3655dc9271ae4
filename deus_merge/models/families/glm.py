"""GLM-4-9B: gate and up in one tensor; half of each head rotary, its pairs neighbouring components."""

from ..family import Family, Sublayer
from ..layouts import Stacked
from ._pieces import attention, fused, norm, projection

ATTENTION = (*norm("n1", "input_layernorm"), *attention(biases="q k v"))
MLP = (
    *norm("n2", "post_attention_layernorm"),
    *fused("gate_up", "mlp.gate_up_proj.weight", Stacked, ("gate", "up"), norm="n2"),
    *projection("down", "mlp.down_proj", norm=None),
)
SUBLAYERS = ((Sublayer("attention", ATTENTION),), (Sublayer("mlp", MLP),))
FAMILY = Family("glm", ("glm",), SUBLAYERS, rotary="phases", rotary_share=0.5, interleaved=True)
