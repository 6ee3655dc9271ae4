"""Gemma 2: norms with scales 1 + w in front of attention and MLP and behind them."""

from ..family import Family
from ._pieces import llama_layer

FRONT = ("input_layernorm", "pre_feedforward_layernorm")
BEHIND = ("post_attention_layernorm", "post_feedforward_layernorm")
FAMILY = Family("gemma2", ("gemma2",), llama_layer("q k v o", norms=FRONT, behind=BEHIND, offset=1.0), rotary="phases")
