"""Mistral: a Llama layer without biases. Its config.json decides on sliding attention."""

from ..family import Family
from ._decoder import decoder_layer

FAMILY = Family("mistral", ("mistral",), decoder_layer(), rotary="phases")
