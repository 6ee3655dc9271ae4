"""Gemma 2: norms with scales 1 + w in front of attention and MLP and behind them; sliding and full attention."""

from ..family import Family, Sublayer
from ._pieces import attention, mlp, norm, norm_behind

SUBLAYERS = (
    (
        Sublayer(
            "attention",
            (
                *norm("n1", "input_layernorm", offset=1.0),
                *attention(biases="q k v o"),
                *norm_behind("o", "post_attention_layernorm", offset=1.0),
            ),
        ),
    ),
    (
        Sublayer(
            "mlp",
            (
                *norm("n2", "pre_feedforward_layernorm", offset=1.0),
                *mlp(),
                *norm_behind("down", "post_feedforward_layernorm", offset=1.0),
            ),
        ),
    ),
)
FAMILY = Family("gemma2", ("gemma2",), SUBLAYERS, rotary="phases")
