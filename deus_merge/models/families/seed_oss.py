"""Seed-OSS: a Llama layer with biases on q, k and v."""

from ..family import Family
from ._pieces import llama_layer

FAMILY = Family("seed_oss", ("seed_oss",), llama_layer("q k v o gate up down"), rotary="phases")
