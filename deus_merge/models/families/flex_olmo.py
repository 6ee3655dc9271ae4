"""FlexOlmo: OLMo 2 with experts; no norm in front of attention and experts, one behind each."""

from ..family import Family, Sublayer
from ._pieces import HEAD_NORMS, attention, experts, norm_behind, router

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
    (
        Sublayer(
            "experts",
            (
                *router(norm=None),
                *experts(norm=None),
                *norm_behind("experts", "post_feedforward_layernorm"),
            ),
        ),
    ),
)
FAMILY = Family("flex_olmo", ("flex_olmo",), SUBLAYERS, rotary="signs")
