"""Falcon: q, k and v of each key-value group in turn in one tensor; old layers, and new ones with two norms."""

from ..family import Case, Family, Sublayer
from ..layouts import PerGroup
from ._pieces import fused, mlp, norm, projection

_OWN = (
    *fused("qkv", "self_attention.query_key_value.weight", PerGroup, ("q", "k", "v"), norm="n1",
           bias="self_attention.query_key_value.bias"),
    *projection("o", "self_attention.dense", norm=None, bias=True),
)  # fmt: skip
_MLP = {"up": "mlp.dense_h_to_4h", "down": "mlp.dense_4h_to_h"}
_N1 = norm("n1", "input_layernorm", bias=True)
SUBLAYERS = (
    (
        Sublayer("attention", (*_N1, *_OWN)),
        Sublayer("attention", (*norm("n1", "ln_attn", bias=True), *norm("n2", "ln_mlp", bias=True), *_OWN)),
    ),
    (
        Sublayer("mlp", (*norm("n2", "post_attention_layernorm", bias=True), *mlp(_MLP, biases="up down"))),
        Sublayer("parallel mlp", mlp(_MLP, norm="n1", biases="up down")),
    ),
)
FAMILY = Family(
    "falcon",
    ("falcon",),
    SUBLAYERS,
    layer_prefix="transformer.h.{layer}.",
    before=("transformer.word_embeddings.weight",),
    after=("transformer.ln_f.weight", "transformer.ln_f.bias", "lm_head.weight"),
    ignored=("self_attention.rotary_emb.inv_freq",),
    rotary="phases",
    cases=(Case("alibi", {"heads": "ALiBi slopes go by the number of a head"}),),
)
