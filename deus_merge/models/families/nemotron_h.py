"""Nemotron-H: a layer is one of Mamba, attention, an MLP without gate, or experts."""

from ..family import Family, Sublayer
from ._pieces import attention, experts, mixer, mlp, norm, router

N1 = norm("n1", "norm")
MODULES = {role: f"mixer.{role}_proj" for role in "qkvo"}
EXPERTS = {"up": "mixer.experts.{e}.up_proj", "down": "mixer.experts.{e}.down_proj"}
SHARED = {"up": "mixer.shared_experts.up_proj", "down": "mixer.shared_experts.down_proj"}
ROUTER = router("mixer.gate.weight", norm="n1", bias="mixer.gate.e_score_correction_bias")
EVERY = mlp(SHARED, norm="n1", prefix="shared.", biases="up down")
SUBLAYERS = (
    (
        Sublayer("attention", (*N1, *attention(MODULES, biases="q k v o"))),
        Sublayer("mlp", (*N1, *mlp({"up": "mixer.up_proj", "down": "mixer.down_proj"}, norm="n1", biases="up down"))),
        Sublayer("experts", (*N1, *ROUTER, *experts(EXPERTS, norm="n1", biases="up down"), *EVERY)),
        Sublayer("mamba", (*N1, *mixer("mixer.", writers=("mixer.out_proj.weight", "mixer.out_proj.bias")))),
    ),
)
FAMILY = Family(
    "nemotron_h", ("nemotron_h",), SUBLAYERS, rotary="none", layer_prefix="backbone.layers.{layer}.",
    before=("backbone.embeddings.weight",), after=("backbone.norm_f.weight", "lm_head.weight"), unchecked=("neurons",),
)  # fmt: skip
