"""Phi-1, 1.5 and 2: attention and MLP in parallel behind one LayerNorm, biases everywhere, no gate."""

from ..family import Case, Family, Sublayer
from ._pieces import attention, head_layer_norm, mlp, norm

_ATTENTION = {"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.dense"}
SUBLAYERS = (
    (
        Sublayer(
            "attention",
            (
                *norm("n1", "input_layernorm", bias=True),
                *attention(_ATTENTION, biases="q k v o"),
                *head_layer_norm("q", "self_attn.q_layernorm"),
                *head_layer_norm("k", "self_attn.k_layernorm"),
            ),
        ),
    ),
    (Sublayer("mlp", mlp({"up": "mlp.fc1", "down": "mlp.fc2"}, norm="n1", biases="up down")),),
)
FAMILY = Family(
    "phi",
    ("phi",),
    SUBLAYERS,
    after=("model.final_layernorm.weight", "model.final_layernorm.bias", "lm_head.weight", "lm_head.bias"),
    rotary="phases",
    rotary_share=0.5,
    cases=(Case("qk_layernorm", {"rotary": "per-head norms subtract the mean of a head's components"}),),
)
