"""Qwen3: a Llama layer with queries and keys normalised per head, and ``layer_types`` in its config."""

from ..family import Family
from ._pieces import HEAD_NORMS, llama_layer

FAMILY = Family("qwen3", ("qwen3",), llama_layer(biases="q k v o", head_norms=HEAD_NORMS), rotary="signs")
