"""OLMo 2 and 3: no norm in front of attention and MLP, one behind each; queries and keys normalised over all heads."""

from ..family import Family, Sublayer
from ._pieces import HEAD_NORMS, attention, mlp, norm_behind

SUBLAYERS = (
    (
        Sublayer(
            "attention",
            (
                *attention(norm=None, biases="q k v o", head_norms=HEAD_NORMS),
                *norm_behind("o", "post_attention_layernorm"),
            ),
        ),
    ),
    (Sublayer("mlp", (*mlp(norm=None), *norm_behind("down", "post_feedforward_layernorm"))),),
)
FAMILY = Family("olmo2", ("olmo2", "olmo3"), SUBLAYERS, rotary="signs")
