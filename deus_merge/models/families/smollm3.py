"""SmolLM3: a Llama layer; some layers have no rotary embedding."""

from ..family import Family
from ._pieces import llama_layer

FAMILY = Family("smollm3", ("smollm3",), llama_layer("q k v o gate up down"), rotary="phases")
