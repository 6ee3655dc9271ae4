"""Mistral 4: layers as DeepSeek-V3 has them."""

from ..family import Family
from .deepseek_v3 import SUBLAYERS, WITHOUT

FAMILY = Family("mistral4", ("mistral4",), SUBLAYERS, without=WITHOUT, unchecked=("value_heads",))
