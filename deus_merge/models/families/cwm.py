"""CWM: a Llama layer; most layers see a sliding window."""

from ..family import Family
from ._pieces import llama_layer

FAMILY = Family("cwm", ("cwm",), llama_layer("q k v o gate up down"), rotary="phases")
