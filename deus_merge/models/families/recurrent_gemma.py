"""RecurrentGemma: recurrent blocks with attention between; norm scales are 1 + w, a half of each head is rotary."""

from ..family import Family, Sublayer
from ._pieces import attention, gated, mixer, mlp, norm

N1 = norm("n1", "temporal_pre_norm", offset=1.0)
MODULES = {role: f"temporal_block.{role}_proj" for role in "qkvo"}
WRITERS = ("temporal_block.linear_out.weight", "temporal_block.linear_out.bias")
SUBLAYERS = (
    (
        Sublayer("attention", (*N1, *attention(MODULES, biases="q k v o"))),
        Sublayer("recurrence", (*N1, *mixer("temporal_block.", writers=WRITERS))),
    ),
    (
        Sublayer(
            "mlp",
            (*norm("n2", "channel_pre_norm", offset=1.0), *mlp(gated("mlp_block"), biases="gate up down")),
        ),
    ),
)
FAMILY = Family(
    "recurrent_gemma", ("recurrent_gemma",), SUBLAYERS, rotary="phases", rotary_share=0.5,
    after=("model.final_norm.weight", "lm_head.weight"), unchecked=("neurons",),
)  # fmt: skip
