"""What transformers builds from a config, layer by layer, and a model whose layers run in another order."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

SIZES: dict[str, Any] = dict(  # noqa: C408
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=8, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, n_layer=8, n_embd=32, n_head=4, num_layers=8, num_heads=4,
    max_position_embeddings=64, num_experts=4, num_local_experts=4, n_routed_experts=4, num_experts_per_tok=2,
    moe_intermediate_size=16, moe_num_experts=4, moe_k=2, sliding_window=4, q_lora_rank=16, kv_lora_rank=16,
    qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8, n_group=1, topk_group=1, mamba_n_heads=8, mamba_d_head=8,
    mamba_d_state=8, mamba_n_groups=1, mamba_num_heads=8, mamba_head_dim=8, ssm_state_size=8, linear_num_key_heads=2,
    linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=8, pad_token_id=0, bos_token_id=1,
    eos_token_id=2, index_topk=8, index_head_dim=8, index_n_heads=2, shared_expert_intermediate_size=16,
    block_size=4, time_step_limit=[0.0, 9.0], intermediate_size_mlp=48, vocab_size_per_layer_input=64,
)  # fmt: skip
#: names of attributes that say where a layer is, not what it does
_PLACE = re.compile(r"^_|layer_idx|layer_id|training|config|layer_number|num_hidden_layers|sliding_window_pattern")
_LISTS = (
    "layer_types", "layers_block_type", "mlp_layer_types", "no_rope_layers", "layer_rope_theta", "attention_layers",
    "indexer_types",
)  # fmt: skip


def saved_config(kind: str, **settings: Any) -> dict[str, Any]:
    """The config.json of a tiny model as transformers saves it."""
    cls = CONFIG_MAPPING[kind]
    known = {**cls().to_dict(), **dict.fromkeys(getattr(cls, "attribute_map", {}), 0), "num_hidden_layers": 0}
    sizes = {key: value for key, value in SIZES.items() if key in known}
    if "q_lora_rank" in known or "kv_lora_rank" in known:
        sizes["num_key_value_heads"] = 4
    config = json.loads(cls(**(sizes | settings)).to_json_string(use_diff=False))
    return {key: value for key, value in config.items() if value is not None}


def loaded(config: dict[str, Any]):
    """A config.json as transformers understands it."""
    return CONFIG_MAPPING[config["model_type"]].from_dict(copy.deepcopy(config))


def build(config, device: str = "meta"):
    """The language model of a config."""
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation="eager")
    return model.float().eval()


def stack(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The largest list of layers of a model, with its name."""
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and re.search(r"(?:^|\.)(?:layers|h|blocks)$", name)
    ]
    return max(lists, key=lambda item: sum(p.numel() for p in item[1].parameters()))


def layers_of(config: dict[str, Any]) -> list[Any]:
    """What each layer of the model of a config.json is: its modules, their settings, its parameters, its lists."""
    understood = loaded(config)
    _, layers = stack(build(understood))
    return [_description(layer, understood, i, len(layers)) for i, layer in enumerate(layers)]


def _description(layer: nn.Module, config, index: int, depth: int) -> list[Any]:
    simple = (int, float, bool, str, type(None))
    found: list[Any] = []
    for name, module in layer.named_modules():
        values = {k: v for k, v in vars(module).items() if not _PLACE.search(k) and isinstance(v, simple)}
        values = {k: round(v, 12) if isinstance(v, float) else v for k, v in values.items()}
        found.append((name, type(module).__name__, sorted(values.items())))
    found += [(name, tuple(p.shape)) for name, p in layer.named_parameters()]
    for key in _LISTS:
        values = getattr(config, key, None)
        if isinstance(values, (list, tuple)) and len(values) == depth:
            found.append((key, values[index]))
    return found


def in_order(model, order: Sequence[int]):
    """A copy of a model whose own layers run in this order, each of the kind it was."""
    model = copy.deepcopy(model)
    name, layers = stack(model)
    depth = len(layers)
    model.get_submodule(name.rpartition(".")[0]).layers = nn.ModuleList(copy.deepcopy(layers[i]) for i in order)
    for module in model.modules():
        if hasattr(module, "first_kv_shared_layer_idx"):
            module.first_kv_shared_layer_idx = len(order)
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    for config in configs.values():
        for key in _LISTS:
            values = vars(config).get(key)
            if isinstance(values, list) and len(values) == depth:
                vars(config)[key] = [values[i] for i in order]
        if "num_hidden_layers" in vars(config) and config.num_hidden_layers == depth:
            vars(config)["num_hidden_layers"] = len(order)
    return model


def lively(model):
    """The model with small random changes in every parameter."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def logits(model) -> torch.Tensor:
    """The model's logits of a few tokens, more than a sliding window holds."""
    tokens = torch.randint(3, 60, (1, 14), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(tokens, use_cache=False).logits
