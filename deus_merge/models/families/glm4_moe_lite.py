"""GLM-4.7 Flash and GLM-5: layers as DeepSeek-V3 and V3.2 have them."""

from ..family import Family
from .deepseek_v3 import SUBLAYERS, WITHOUT

FAMILY = Family(
    "glm4_moe_lite", ("glm4_moe_lite", "glm_moe_dsa"), SUBLAYERS, without=WITHOUT, unchecked=("value_heads",)
)
