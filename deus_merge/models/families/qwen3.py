"""Qwen3, also as the text part of Qwen3-VL: a Llama layer with queries and keys normalised per head."""

from ..family import Family
from ._pieces import HEAD_NORMS, llama_layer

FAMILY = Family("qwen3", ("qwen3", "qwen3_vl_text"), llama_layer("q k v o", HEAD_NORMS), rotary="signs")
