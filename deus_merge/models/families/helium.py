"""Helium: a Llama layer whose rotary pairs are neighbouring components."""

from ..family import Family
from ._pieces import llama_layer

FAMILY = Family("helium", ("helium",), llama_layer("q k v gate up down"), rotary="phases", interleaved=True)
