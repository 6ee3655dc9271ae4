"""OPT: LayerNorms and biases everywhere, an MLP without a gate, learned positions."""

from ..family import Case, Family
from ._pieces import llama_layer

ATTENTION = {
    "q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.out_proj",
}  # fmt: skip
MLP = {"up": "fc1", "down": "fc2"}
NORMS = ("self_attn_layer_norm", "final_layer_norm")
SUBLAYERS = llama_layer("q k v o up down", modules=ATTENTION, mlp_modules=MLP, norms=NORMS, norm_bias=True)
FAMILY = Family(
    "opt",
    ("opt",),
    SUBLAYERS,
    layer_prefix="model.decoder.layers.{layer}.",
    before=("model.decoder.embed_tokens.weight",),
    after=("lm_head.weight",),
    cases=(
        Case(
            "do_layer_norm_before", no_identity="its norms are on the residual stream, behind what is added",
            when=False, default=True,
        ),
    ),
)  # fmt: skip
