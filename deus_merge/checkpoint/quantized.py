"""Weights whose stored numbers are codes: quantised tensors and the tensors that give the codes their meaning.

They are recognised by their names, as the libraries that quantise write them, and are only copied.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from ..core.tensors import StoredTensor
from ..core.units import ITEMSIZE

#: names that only quantised weights have
_PACKED = re.compile(r"(.+)\.(?:qweight|W_q|weight_packed|\w+_proj_blocks)")
_OWN = re.compile(
    r"(?P<module>.+)\.(?:qweight|qzeros|W_q|SCB|weight_packed|codebooks|weight\.(?:quant_state\..+|(?:nested_)?absmax"
    r"|(?:nested_)?quant_map|_data|_scale|_shift))"
)
#: names that mean it where a tensor of one of the other names is there: {0} is what the group matched
_BESIDE = tuple(
    (re.compile(pattern), partners)
    for pattern, partners in (
        (r"(.+)_(?:scale|scale_inv|scale_2|scales|global_scale|zero_point|shape|g_idx)",
         ("{0}", "{0}_packed", "{0}_blocks")),
        (r"(.+)_blocks", ("{0}_scales",)),
        (r"(.+)\.(?:scales|g_idx)", ("{0}.qweight",)),
        (r"(.+)\.weight_format", ("{0}.SCB",)),
        (r"(.+)\.(?:input|output|act|activation)_(?:scale|scale_inv|zero_point|global_scale)",
         ("{0}.weight", "{0}.weight_packed", "{0}.qweight")),
    )
)  # fmt: skip
#: a part of every name above
_SIGN = re.compile(r"scale|zero_point|_shape|g_idx|_blocks|_packed|qweight|qzeros|W_q|SCB|format|codebooks|weight\.")
#: keys of a config.json
_SECTIONS = {"quantization_config", "compression_config"}
#: settings of how a model was quantised, or is run
_NOT_FORMAT = re.compile(
    r"_.*|.*compute_dtype|.*version.*|.*exllama.*|dataset|damp.*|tokenizer|batch_size|.*status|observer|dynamic"
)
_CACHE_SCALE = re.compile(r"(?:.+\.)?[qkv]_(?:scale|zero_point|global_scale)")
_SCALE = re.compile(r"(.+)\.(?:scale|scale_inv|scales|k_scale|v_scale|q_scale)")


def quantization(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The section of config.json that says how weights are quantised; None without one."""
    parts = [
        config,
        *(value for key, value in config.items() if key.endswith("_config") and isinstance(value, Mapping)),
    ]
    found = (part.get(key) for part in parts for key in sorted(_SECTIONS, reverse=True))
    return next((value for value in found if isinstance(value, Mapping) and value), None)


def format_settings(section: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a section that say what stored codes mean: without those of how a model was quantised or is run,
    and without lists of modules."""
    return {
        key: format_settings(value) if isinstance(value, Mapping) else value
        for key, value in section.items()
        if not isinstance(value, list) and not _NOT_FORMAT.fullmatch(key)
    }


def with_quantization(config: Mapping[str, Any], section: Mapping[str, Any] | None) -> dict[str, Any]:
    """A config with another section about quantisation in the place of the one that `quantization` finds; or, for
    None, without any."""
    result = {}
    for key, value in config.items():
        if key in _SECTIONS:
            if section is not None:
                result[key] = section
        elif key.endswith("_config") and isinstance(value, Mapping) and _SECTIONS & value.keys():
            result[key] = with_quantization(value, section)
        else:
            result[key] = value
    return result


def quantized_tensors(tensors: Mapping[str, StoredTensor], config: Mapping[str, Any]) -> dict[str, str]:
    """The quantised weights of a checkpoint and their companions.

    Args:
        tensors: All tensors by name.
        config: config.json.

    Returns:
        Name -> a tensor that it is read together with, or itself where there is none. Weights in FP8 without scales
        are not among them, unless the config has a section about quantisation.
    """
    described = quantization(config) is not None
    found: dict[str, str] = {}
    for name, tensor in tensors.items():
        if is_cache_scale(name):
            continue
        small = ITEMSIZE[tensor.dtype] == 1 and tensor.dtype != "BOOL"
        if described and small:
            found.setdefault(name, name)
        if _SIGN.search(name) and (partner := _partner(name, tensors, described)):
            found[name] = partner
            found[partner] = name
    return found


def is_cache_scale(name: str) -> bool:
    """Whether a tensor scales an attention's cache of keys and values: it is no part of a weight."""
    return name.endswith(("_scale", "_zero_point")) and _CACHE_SCALE.fullmatch(name) is not None


def is_packed(names: Iterable[str]) -> bool:
    """Whether weights are stored under other names and shapes than the model's own, so that its layers lack tensors."""
    return any(_PACKED.fullmatch(name) for name in names)


def quantization_name(config: Mapping[str, Any]) -> str:
    """The ``quant_method`` of a config, for messages."""
    method = (quantization(config) or {}).get("quant_method")
    return method if isinstance(method, str) else "of an unknown kind"


def _partner(name: str, tensors: Mapping[str, StoredTensor], described: bool) -> str | None:
    """A tensor that this one is read together with; itself for a name that says enough; None for a plain tensor."""
    if match := _OWN.fullmatch(name):
        weight = f"{match['module']}.weight"
        return weight if weight in tensors else name
    for pattern, partners in _BESIDE:
        if match := pattern.fullmatch(name):
            for partner in (p.format(match[1]) for p in partners):
                if partner in tensors:
                    return partner
    if match := _SCALE.fullmatch(name):
        weight = f"{match[1]}.weight"
        if weight in tensors and ITEMSIZE[tensors[weight].dtype] == 1:
            return weight
        return name if described else None
    return None
