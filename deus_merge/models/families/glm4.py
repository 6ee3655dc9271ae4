"""GLM-4-0414: GLM with norms behind attention and MLP as well."""

from dataclasses import replace

from ..family import Sublayer
from ._pieces import norm_behind
from .glm import ATTENTION, MLP
from .glm import FAMILY as GLM

SUBLAYERS = (
    (Sublayer("attention", (*ATTENTION, *norm_behind("o", "post_self_attn_layernorm"))),),
    (Sublayer("mlp", (*MLP, *norm_behind("down", "post_mlp_layernorm"))),),
)
FAMILY = replace(GLM, name="glm4", model_types=("glm4",), sublayers=SUBLAYERS)
