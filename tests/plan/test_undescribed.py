"""Families that nobody described: new layers are copies whose writers were found and proved, or are refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers

_SMALL = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip


def make(folder: Path, model_type: str, **more) -> Path:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(model_type, **{**_SMALL, **more})
    model = transformers.AutoModelForCausalLM.from_config(config).float()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder


def recipe(folder: Path, base: Path, preset: str, **more) -> Path:
    text = json.dumps({"base_model": str(base), "upscale": {"preset": preset, "insert": {"after": [0, 2]}, **more}})
    (folder / f"{preset}.yml").write_text(text)
    return folder / f"{preset}.yml"


def logits(folder: Path) -> torch.Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    with torch.no_grad():
        return model(torch.arange(3, 27)[None], use_cache=False).logits


@pytest.mark.parametrize("model_type", ["vaultgemma", "jetmoe"])
@pytest.mark.parametrize("preset", ["llama_pro", "copy_next"])
def test_copies_keep_the_function(run, tmp_path, model_type, preset):
    base = make(tmp_path / "base", model_type)
    planned = run("plan", recipe(tmp_path, base, preset), "--json").json()
    assert planned["function_preserving"] and planned["new_layers"] == [1, 4]
    run("merge", tmp_path / f"{preset}.yml", tmp_path / "out")
    assert torch.equal(logits(tmp_path / "out"), logits(base))
    plain = recipe(tmp_path, base, preset, parameters={"zero_init": False})
    run("merge", plain, tmp_path / "plain")
    assert not torch.equal(logits(tmp_path / "plain"), logits(base))


@pytest.mark.parametrize("model_type", ["openai-gpt", "doge"])
def test_layers_that_are_not_x_plus_f_of_x_are_refused(run, tmp_path, model_type):
    """OpenAI GPT normalises behind the residual addition, Doge scales the residual stream."""
    base = make(tmp_path / "base", model_type)
    told = run("merge", recipe(tmp_path, base, "llama_pro"), tmp_path / "out", expect=2).err
    assert "cannot start as the identity" in told and "solar, stack" in told and not (tmp_path / "out").exists()
    run("merge", recipe(tmp_path, base, "stack", insert={"count": 4}), tmp_path / "stacked")


def test_alignment_needs_a_description(run, tmp_path):
    base = make(tmp_path / "base", "vaultgemma")
    told = run("merge", recipe(tmp_path, base, "opt_deus"), tmp_path / "out", expect=2).err
    assert "presets llama_pro and copy_next" in told and "model_type vaultgemma" in told


def test_what_transformers_cannot_build_is_refused(run, tmp_path):
    base = make(tmp_path / "base", "vaultgemma")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"model_type": "unheard_of"}))
    told = run("merge", recipe(tmp_path, base, "llama_pro"), tmp_path / "out", expect=2).err
    assert "unheard_of" in told and not (tmp_path / "out").exists()
