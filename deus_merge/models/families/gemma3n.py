"""Gemma 3n: several residual streams that each layer predicts and corrects, a low-rank path beside attention."""

from ..family import Family, Sublayer
from ._pieces import HEAD_NORMS, attention, mixer, mlp, norm, norm_behind

PER_LAYER = mixer(
    "altup.", "laurel.", "per_layer_input_gate.", "post_per_layer_input_norm.", writers=("per_layer_projection.weight",)
)
SUBLAYERS = (
    (
        Sublayer(
            "attention",
            (
                *norm("n1", "input_layernorm"),
                *attention(head_norms=HEAD_NORMS),
                *norm_behind("o", "post_attention_layernorm"),
            ),
        ),
    ),
    (
        Sublayer(
            "mlp",
            (
                *norm("n2", "pre_feedforward_layernorm"),
                *mlp(),
                *norm_behind("down", "post_feedforward_layernorm"),
            ),
        ),
    ),
    (Sublayer("per-layer inputs", PER_LAYER),),
)
FAMILY = Family(
    "gemma3n", ("gemma3n_text",), SUBLAYERS, rotary="signs",
    no_identity="every layer predicts its residual streams anew (AltUp)",
)  # fmt: skip
