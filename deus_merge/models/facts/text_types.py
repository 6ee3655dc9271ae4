"""The language models of composite models whose config need not name them.

Reference: the configuration classes of transformers 5.23.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

#: model_type -> the model_type of its text_config, where that says none
TEXT_TYPES: Mapping[str, str] = {
    "audioflamingo3": "qwen2",
    "aya_vision": "cohere2",
    "cohere2_vision": "cohere2",
    "cosmos3_omni": "qwen3_vl_text",
    "exaone4_5": "exaone4",
    "fast_vlm": "qwen2",
    "fun_asr_nano": "qwen3",
    "gemma4_unified_assistant": "gemma4_unified_text",
    "got_ocr2": "qwen2",
    "inkling_mm_model": "inkling_text",
    "internvl": "qwen2",
    "jev": "qwen3_5_text",
    "kimi_k25": "deepseek_v3",
    "lfm2_vl": "lfm2",
    "lfm3_vl": "lfm3",
    "lighton_ocr": "qwen3",
    "llava_onevision": "qwen2",
    "minicpm_ocr": "qwen3_5_text",
    "minicpmv4_6": "qwen3_5_text",
    "minicpmv4_7": "qwen3_5_text",
    "moss_transcribe_diarize": "qwen3",
    "musicflamingo": "qwen2",
    "nemo_speechlm": "nemotron_h",
    "nemotron_h_omni": "nemotron_h",
    "ovis2": "qwen2",
    "pp_chart2table": "qwen2",
    "qianfan_ocr": "qwen3",
    "qwen2_5_omni_thinker": "qwen2_5_omni_text",
    "qwen2_audio": "qwen2",
    "qwen3_asr": "qwen3",
    "qwen3_omni_moe_thinker": "qwen3_omni_moe_text",
    "shieldgemma2": "gemma3_text",
    "t5gemma2_encoder": "t5gemma2_text",
    "vibevoice": "qwen2",
    "vibevoice_asr": "qwen2",
    "video_llama_3": "qwen2",
}


def names_of_type(stated: Any, place: Sequence[str], model_type: str) -> tuple[str, ...]:
    """The names under which the kind of a stack of layers may be known.

    Args:
        stated: The ``model_type`` of the section of config.json that describes the stack, if it says one.
        place: The keys that lead to the section; none for the top.
        model_type: The whole model's.
    """
    kind = stated if place and isinstance(stated, str) else None
    if kind is None:
        kind = "" if place and place[0] != "text_config" else TEXT_TYPES.get(model_type, model_type)
    return kind, f"{kind}_text", f"{kind}_text_model"
