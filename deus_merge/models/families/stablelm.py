"""StableLM: LayerNorms with biases; attention and MLP may be in parallel behind one norm; heads may have own norms."""

from ..family import Case, Family, Sublayer
from ..spec import TensorSpec
from ._pieces import attention, mlp, norm

_OWN = "every head's queries and keys have a norm of their own"
_NORMS = tuple(
    TensorSpec(f"self_attn.{side}_layernorm.*", f"self_attn.{side}_layernorm.*", opaque=True, optional=True)
    for side in "qk"
)
SUBLAYERS = (
    (Sublayer("attention", (*norm("n1", "input_layernorm", bias=True), *attention(biases="q k v"), *_NORMS)),),
    (
        Sublayer("mlp", (*norm("n2", "post_attention_layernorm", bias=True), *mlp())),
        Sublayer("parallel mlp", mlp(norm="n1")),
    ),
)
FAMILY = Family(
    "stablelm",
    ("stablelm",),
    SUBLAYERS,
    after=("model.norm.weight", "model.norm.bias", "lm_head.weight"),
    rotary="phases",
    rotary_share=0.25,
    cases=(Case("qk_layernorm", {"heads": _OWN, "rotary": _OWN}),),
)
