"""A tiny random model of every described family, as transformers saves it; every parameter is lively."""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import transformers
from safetensors.torch import load_file, save_file
from settings import COMPOSITES, SETTINGS, SMALL
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from deus_merge.models.family import families


def type_of(kind: str) -> str:
    """The model type of a kind."""
    return kind.partition(":")[0]


def _stacked(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Experts that are saved one by one, in tensors of a layer."""
    pattern = re.compile(r"(.*mlp\.experts\.)\d+\.(gate|up|down)_proj\.weight")
    found: dict[tuple[str, str], list[torch.Tensor]] = {}
    for name in sorted(tensors):
        if match := pattern.fullmatch(name):
            found.setdefault((match[1], match[2]), []).append(tensors[name])
    rest = {name: x for name, x in tensors.items() if not pattern.fullmatch(name)}
    for prefix in {prefix for prefix, _ in found}:
        gate, up, down = (torch.stack(found[prefix, role]) for role in ("gate", "up", "down"))
        rest |= {f"{prefix}gate_up_proj": torch.cat((gate, up), 1), f"{prefix}down_proj": down}
    return rest


def _turned(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Stacked experts as (E, inputs, outputs)."""
    return {n: x.transpose(1, 2).contiguous() if ".experts." in n else x for n, x in tensors.items()}


#: kinds as they are published, where transformers saves them in another form
PUBLISHED = {"qwen3_5_moe_text:published": _stacked, "qwen3_vl_moe_text:published": _turned}
#: a text part of other models only, but there is a class for it
transformers.AutoModelForCausalLM.register(transformers.Mistral4Config, transformers.Mistral4ForCausalLM, exist_ok=True)
_LOADED = {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *COMPOSITES, "mistral4"}
_TYPES = {kind for family in families().values() for kind in family.model_types} & _LOADED
#: model types, and further settings of some: ``falcon:new``
MODEL_TYPES = sorted(_TYPES | {kind for kind in SETTINGS if type_of(kind) in _TYPES})


def values_of(kind: str) -> dict[str, Any]:
    """The values of its config."""
    return {k: v for k, v in {**SMALL, **SETTINGS.get(kind, {})}.items() if v is not ...}


def make(folder: Path, kind: str, seed: int = 0, deepstack: Sequence[int] = (), **more) -> Path:
    """Save a tiny model; ``more`` are values of its config, ``deepstack`` are the layers of a vision tower whose
    features enter after the first text layers."""
    model_type = type_of(kind)
    values = {**values_of(kind), **more}
    if model_type in COMPOSITES:
        model_type, vision = COMPOSITES[model_type]
        vision = {k: [*deepstack] if k == "deepstack_visual_indexes" else v for k, v in vision.items()}
        ids = {f"{name}_token_id": 90 + i for i, name in enumerate(("image", "video", "vision_start", "vision_end"))}
        values = {"text_config": values, "vision_config": vision, **ids, "tie_word_embeddings": False}
    config = transformers.AutoConfig.for_model(model_type, **values)
    torch.manual_seed(seed)
    save(folder, _auto("vision_config" in values).from_config(config))
    if kind in PUBLISHED:
        tensors = PUBLISHED[kind](load_file(folder / "model.safetensors"))
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def save(folder: Path, model: transformers.PreTrainedModel) -> None:
    """As transformers saves it, in float32, with every parameter lively."""
    model.float()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(folder)


@functools.cache
def shared(kind: str, seed: int = 0) -> Path:
    """A tiny model that no test changes."""
    folder = Path(tempfile.mkdtemp(prefix=f"deus-{type_of(kind)}-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return make(folder, kind, seed)


def load(folder: Path, dtype: torch.dtype = torch.float32) -> transformers.PreTrainedModel:
    """As transformers loads it; attention as plain matrix products, which round the same way for any mask."""
    plain = {"attn_implementation": "eager", "experts_implementation": "eager"}
    auto = _auto("vision_config" in config_of(folder))
    model, report = auto.from_pretrained(folder, dtype=dtype, output_loading_info=True, **plain)
    found = {key: names for key, names in report.items() if names}
    assert not found, found
    with torch.no_grad():
        for parameter in model.parameters():  # where in memory a matrix begins may change how its products round
            parameter.data = parameter.to(dtype, copy=True)  # also what is kept in float32
    return model.eval()


def _auto(sees: bool) -> type:
    """The class that makes and loads models, with a vision tower or without."""
    return transformers.AutoModelForImageTextToText if sees else transformers.AutoModelForCausalLM


def logits(model: transformers.PreTrainedModel, tokens: int = 24) -> torch.Tensor:
    """(1, tokens, vocabulary): longer than the sliding windows."""
    ids = torch.randint(3, 96, (1, tokens), generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), _all_in(model.dtype):
        return model(ids, use_cache=False).logits


@contextlib.contextmanager
def _all_in(dtype: torch.dtype) -> Iterator[None]:
    """Modules that compute parts in float32 do not, in float64."""
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    with (
        mock.patch.object(torch, "float32", dtype),
        mock.patch.object(torch, "float", dtype),
        mock.patch.object(torch.Tensor, "float", lambda x: x.to(dtype)),
    ):
        try:
            yield
        finally:
            torch.set_default_dtype(usual)


def config_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())
