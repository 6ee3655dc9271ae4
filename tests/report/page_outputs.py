"""Outputs of many kinds, and a comparison: what pages are about."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from support import make_model, save_tokenizer, train_tokenizer, write_recipe

import deus_merge as dm
from deus_merge.models.demo import tiny_model
from deus_merge.training import carry_manifest
from deus_merge.training.comparison.candidates import Candidate
from deus_merge.training.comparison.result import Comparison

WORDS = Path(__file__).parents[2] / "CONTRIBUTING.md"

_SLERP = """
merge_method: slerp
base_model: {a}
slices: [{{sources: [{{model: {a}, layer_range: [0, 24]}}, {{model: {b}, layer_range: [0, 24]}}]}}]
parameters: {{t: 0.4}}
"""
_LINEAR = """
merge_method: linear
models: [{{model: {a}, parameters: {{weight: 0.5}}}}, {{model: {b}, parameters: {{weight: 0.5}}}}]
"""
_ALIGNED = """
merge_method: linear
align: symmetry
base_model: {a}
models: [{{model: {a}, parameters: {{weight: 0.4}}}}, {{model: {b}, parameters: {{weight: 0.3}}}},
  {{model: {c}, parameters: {{weight: 0.3}}}}]
"""


def outputs(root: Path) -> dict[str, Path]:
    """Folders of outputs by what is special about them."""
    tiny = tiny_model()
    a, b, c = (
        make_model(root / f"models/{name}", layers=24, seed=i) for i, name in enumerate(("one", "other", "third"))
    )
    deep = make_model(root / "models/deep", layers=40)
    experts = root / "models/experts"
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        vocab_size=128, hidden_size=32, intermediate_size=48, moe_intermediate_size=24, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, num_hidden_layers=4, num_experts=8, num_experts_per_tok=2,
        max_position_embeddings=64,
    )  # fmt: skip
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(experts)
    save_tokenizer(experts, train_tokenizer(), bos_token="<s>", eos_token="</s>")
    recipes = {"two-sources": _SLERP, "linear": _LINEAR, "aligned": _ALIGNED}
    for name, text in recipes.items():
        dm.merge(write_recipe(root / f"{name}.yml", text.format(a=a, b=b, c=c)), root / name)
    dm.upscale(str(tiny), root / "tiny")
    dm.upscale(str(tiny), root / "flow", preset="opt_deus_paper")
    dm.upscale(str(deep), root / "many-plots", insert="all")
    dm.upscale(str(deep), root / "stack", preset="solar")
    dm.upscale(str(experts), root / "experts")
    dm.calibrate(
        root / "tiny",
        root / "calibrated",
        WORDS.read_text(encoding="utf-8"),
        dm.CalibrationOptions(tokens=512, length=64),
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(root / "tiny")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(0.01 * name.startswith("model.layers.4."))
    model.save_pretrained(root / "trained")
    carry_manifest(root / "tiny", root / "trained")
    return {folder.name: folder for folder in sorted(root.iterdir()) if (folder / "deus_merge.json").is_file()}


def comparison(folder: Path) -> Path:
    """The page of a comparison with a curve for each of its candidates."""
    folder.mkdir()
    inits = ("llama_pro", "copy_next", "lesa{zero_init: true}")
    candidates = tuple(Candidate(init, '{"count": 4, "where": "top"}', "adamw") for init in inits)
    runs = [
        {
            "init": one.init, "insert": one.insert, "optimizer": one.optimizer, "lr": 1e-3, "seed": seed,
            "initial": 5.0, "final": 4.0 + 0.1 * i + 0.02 * seed, "tflop": 12.5 * (i + 1), "trained": 10_000_000,
            "curve": [(0, 5.0), (256, 4.5 + 0.1 * i), (512, 4.0 + 0.1 * i + 0.02 * seed)], "memory": 10**9,
            "seconds": 61.0, "new_layers": [1], "base_before": 4.0, "base_after": 4.1,
        }
        for i, one in enumerate(candidates)
        for seed in range(3)
    ]  # fmt: skip
    Comparison(
        folder,
        candidates,
        tuple(runs),
        {"model": "0123abcd", "steps": 8, "base_text": ""},
        False,
        {"model": "org/a model"},
    ).write()
    return folder / "report.html"
