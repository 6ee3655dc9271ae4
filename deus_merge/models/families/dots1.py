"""dots.llm1: GLM-4.5's layers, with rotary embeddings of whole heads."""

from dataclasses import replace

from .glm4_moe import FAMILY as GLM

FAMILY = replace(GLM, name="dots1", model_types=("dots1",), rotary_share=1.0)
