"""Qwen3.5: linear attention, or attention whose output is gated per component; norms with scales 1 + w."""

from ..family import Family, Sublayer
from ..layouts import PerHead
from ._pieces import HEAD_NORMS, attention, fused, mixer, mlp, norm

_OWN = attention(biases="k v o", head_norms=HEAD_NORMS, head_norm_offset=1.0)
#: each head's rows of q and then of its gate
_QUERIES = fused("q_and_gate", "self_attn.q_proj.weight", PerHead, ("q", "q_gate"), norm="n1",
                 bias="self_attn.q_proj.bias")  # fmt: skip
N1 = norm("n1", "input_layernorm", offset=1.0)
N2 = norm("n2", "post_attention_layernorm", offset=1.0)
MIXERS = (
    Sublayer("linear attention", (*N1, *mixer("linear_attn.", writers=("linear_attn.out_proj.weight",)))),
    Sublayer("attention", (*N1, *_QUERIES, *(spec for spec in _OWN if spec.role != "q"))),
)
WITHOUT = {"values": "what the heads give is gated component by component"}
FAMILY = Family(
    "qwen3_5",
    ("qwen3_5_text",),
    (MIXERS, (Sublayer("mlp", (*N2, *mlp())),)),
    rotary="signs",
    rotary_share=0.25,
    without=WITHOUT,
)
