"""Qwen3: a Llama layer with queries and keys normalised per head, and ``layer_types`` in its config."""

from ..family import Family
from ._decoder import decoder_layer

FAMILY = Family("qwen3", ("qwen3",), decoder_layer(biases="q k v o", head_norms=True), rotary="signs")
