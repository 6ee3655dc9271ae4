"""Names of modules that loaders fuse, and look up in a config under the name of the fused module."""

from __future__ import annotations

from collections.abc import Iterable

_FUSED = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj",
          "gate_proj": "gate_up_proj", "up_proj": "gate_up_proj"}  # fmt: skip


def with_experts(modules: Iterable[str]) -> list[str]:
    """Names of modules and, for ``...mlp.experts.0.up_proj``, also ``...mlp.experts``."""
    names = list(dict.fromkeys(modules))
    return list(dict.fromkeys([*names, *(f"{n.partition('.experts.')[0]}.experts" for n in names if ".experts." in n)]))


def with_fused(modules: Iterable[str]) -> list[str]:
    """As `with_experts`, and also ``...self_attn.qkv_proj`` for ``...self_attn.q_proj``, ``...mlp.gate_up_proj`` for
    ``...mlp.up_proj``."""
    names = with_experts(modules)
    split = [name.rpartition(".") for name in names if ".experts." not in name]
    return list(dict.fromkeys([*names, *(f"{parent}.{_FUSED[last]}" for parent, _, last in split if last in _FUSED)]))
