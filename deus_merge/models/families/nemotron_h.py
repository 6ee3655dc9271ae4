"""Nemotron-H: a layer is one of Mamba, attention, an MLP without gate, or experts, perhaps latent ones."""

from dataclasses import replace

from ..family import Family, Sublayer
from ..spec import RESIDUAL, TensorSpec
from ._pieces import attention, bias_of, experts, mixer, mlp, norm, router

N1 = norm("n1", "norm")
MODULES = {role: f"mixer.{role}_proj" for role in "qkvo"}
EXPERTS = {"up": "mixer.experts.{e}.up_proj", "down": "mixer.experts.{e}.down_proj"}
SHARED = {"up": "mixer.shared_experts.up_proj", "down": "mixer.shared_experts.down_proj"}
ROUTER = router("mixer.gate.weight", norm="n1", bias="mixer.gate.e_score_correction_bias")
EVERY = mlp(SHARED, norm="n1", prefix="shared.", biases="up down")
IN = TensorSpec("latent_in", "mixer.fc1_latent_proj.weight", RESIDUAL, "latent", norm="n1")
OUT = TensorSpec("latent_out", "mixer.fc2_latent_proj.weight", "latent", RESIDUAL)


def _inside(spec: TensorSpec) -> TensorSpec:
    """A tensor of an expert that reads and writes the latent space."""
    reads, writes = ("latent" if space == RESIDUAL else space for space in (spec.in_space, spec.out_space))
    return replace(spec, in_space=reads, out_space=writes, norm=None)


LATENT_EXPERTS = (
    *(IN, bias_of(IN, "mixer.fc1_latent_proj.bias")),
    *map(_inside, experts(EXPERTS, norm="n1", biases="up down")),
    *(OUT, bias_of(OUT, "mixer.fc2_latent_proj.bias")),
)
SUBLAYERS = (
    (
        Sublayer("attention", (*N1, *attention(MODULES, biases="q k v o"))),
        Sublayer("mlp", (*N1, *mlp({"up": "mixer.up_proj", "down": "mixer.down_proj"}, norm="n1", biases="up down"))),
        Sublayer("experts", (*N1, *ROUTER, *experts(EXPERTS, norm="n1", biases="up down"), *EVERY)),
        Sublayer("latent experts", (*N1, *ROUTER, *LATENT_EXPERTS, *EVERY)),
        Sublayer("mamba", (*N1, *mixer("mixer.", writers=("mixer.out_proj.weight", "mixer.out_proj.bias")))),
    ),
)
FAMILY = Family(
    "nemotron_h", ("nemotron_h",), SUBLAYERS, rotary="none", layer_prefix="backbone.layers.{layer}.",
    before=("backbone.embeddings.weight",), after=("backbone.norm_f.weight", "lm_head.weight"), unchecked=("neurons",),
)  # fmt: skip
