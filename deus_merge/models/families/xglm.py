"""XGLM: OPT's layer under other names."""

from ..family import Family
from .opt import SUBLAYERS

FAMILY = Family(
    "xglm",
    ("xglm",),
    SUBLAYERS,
    after=("model.layer_norm.weight", "model.layer_norm.bias", "lm_head.weight"),
    layers_key="num_layers",
)
