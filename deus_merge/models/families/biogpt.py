"""BioGPT: OPT's layer under other names."""

from ..family import Family
from .opt import SUBLAYERS

FAMILY = Family(
    "biogpt",
    ("biogpt",),
    SUBLAYERS,
    layer_prefix="biogpt.layers.{layer}.",
    before=("biogpt.embed_tokens.weight",),
    after=("biogpt.layer_norm.weight", "biogpt.layer_norm.bias", "output_projection.weight"),
    tied=("output_projection.weight",),
)
