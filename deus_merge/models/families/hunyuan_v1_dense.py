"""Hunyuan: a Llama layer with queries and keys normalised per head behind the rotary embedding."""

from ..family import Family
from ._pieces import llama_layer

HEAD_NORMS = {"q": "self_attn.query_layernorm", "k": "self_attn.key_layernorm"}
FAMILY = Family("hunyuan_v1_dense", ("hunyuan_v1_dense",), llama_layer("q k v o", HEAD_NORMS), rotary="signs")
