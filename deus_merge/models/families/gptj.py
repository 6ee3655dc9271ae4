"""GPT-J: attention and MLP in parallel behind one LayerNorm, no gate; rotary pairs are neighbouring components."""

from ..family import Case, Family, Sublayer
from ._pieces import UNKNOWN_ROTARY, attention, mlp, norm

_ATTENTION = {"q": "attn.q_proj", "k": "attn.k_proj", "v": "attn.v_proj", "o": "attn.out_proj"}
MLP = mlp({"up": "mlp.fc_in", "down": "mlp.fc_out"}, norm="n1", biases="up down")
SUBLAYERS = (
    (Sublayer("attention", (*norm("n1", "ln_1", bias=True), *attention(_ATTENTION))),),
    (Sublayer("mlp", MLP),),
)
FAMILY = Family(
    "gptj",
    ("gptj",),
    SUBLAYERS,
    layer_prefix="transformer.h.{layer}.",
    before=("transformer.wte.weight",),
    after=("transformer.ln_f.weight", "transformer.ln_f.bias", "lm_head.weight", "lm_head.bias"),
    ignored=("attn.bias", "attn.masked_bias", "attn.embed_positions"),
    layers_key="n_layer",
    rotary="phases",
    interleaved=True,
    cases=(Case("rotary_dim", UNKNOWN_ROTARY, when=False),),
)
