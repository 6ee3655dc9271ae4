"""Mamba, Mamba 2 and Falcon Mamba: a norm and a mixer in every layer, and nothing else."""

from ..family import Family, Sublayer
from ._pieces import mixer, norm

WRITERS = ("mixer.out_proj.weight", "mixer.out_proj.bias")
FAMILY = Family(
    "mamba", ("mamba", "mamba2", "falcon_mamba"),
    ((Sublayer("mamba", (*norm("n1", "norm"), *mixer("mixer.", writers=WRITERS))),),),
    layer_prefix="backbone.layers.{layer}.", before=("backbone.embeddings.weight",),
    after=("backbone.norm_f.weight", "lm_head.weight"),
)  # fmt: skip
