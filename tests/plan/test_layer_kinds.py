"""Families nobody described, where depth or order change: the base's function, or exit code 2 and the config's key."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from support import logits, make_model, write_recipe

from deus_merge.models.layer_kinds import build_stack

SMALL = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 6, "num_attention_heads": 4,
    "num_key_value_heads": 4, "head_dim": 8, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "n_group": 1, "topk_group": 1}
#: model_type -> its config, keys that a published config lacks, and a key that must be named
FAMILIES = {
    "gemma2": ({"sliding_window": 8}, ["layer_types"], ""),
    "gemma3_text": ({"sliding_window": 8, "sliding_window_pattern": 3}, ["layer_types"], "sliding_window_pattern"),
    "cohere2": ({"sliding_window": 8, "sliding_window_pattern": 3}, ["layer_types"], "sliding_window_pattern"),
    "qwen3_moe": (
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "mlp_only_layers": [4]}, [],
        "mlp_only_layers",
    ),
    "llama4_text": (
        {"num_local_experts": 2, "num_experts_per_tok": 1, "intermediate_size_mlp": 64, "interleave_moe_layer_step": 1},
        [], "moe_layers",
    ),
    "deepseek_v3": ({**LATENT, **ROUTED, "first_k_dense_replace": 4}, [], "first_k_dense_replace"),
}  # fmt: skip


def make(folder: Path, kind: str) -> Path:
    changes, drop, _ = FAMILIES[kind]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(kind, **{**SMALL, **changes})
    ).float()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text()) | {k: v for k, v in changes.items() if "pattern" in k}
    path.write_text(json.dumps({key: value for key, value in config.items() if key not in drop}))
    return folder


def recipe(folder: Path, base: Path, *slices: str) -> Path:
    text = "merge_method: passthrough\nslices:\n" + "".join(f"  - sources: [{{model: {base}, {s}}}]\n" for s in slices)
    return write_recipe(folder / "recipe.yml", text)


SILENT = "parameters: {scale: [{filter: o_proj, value: 0}, {filter: down_proj, value: 0}, {value: 1}]}"


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_silent_copy_keeps_the_function_or_is_refused(run, tmp_path, kind):
    base, out = make(tmp_path / "base", kind), tmp_path / "out"
    slices = ["layer_range: [0, 3]", f"layer_range: [2, 3], {SILENT}", "layer_range: [3, 6]"]
    done = run("merge", recipe(tmp_path, base, *slices), out, expect=None)
    if done.code == 0:
        ids = torch.randint(3, 64, (1, 40), generator=torch.Generator().manual_seed(1))
        assert torch.equal(logits(out, ids), logits(base, ids))
    else:
        assert done.code == 2 and not out.exists()
        assert FAMILIES[kind][2] in done.err and "layer" in done.err, done.err


@pytest.mark.parametrize("ranges", [([0, 2], [0, 6]), ([1, 6],)])
def test_a_count_of_first_layers(run, tmp_path, ranges):
    """As many of the output's layers are dense as of those it is made of, or it is refused."""
    base, out = make(tmp_path / "base", "deepseek_v3"), tmp_path / "out"
    done = run("merge", recipe(tmp_path, base, *(f"layer_range: {r}" for r in ranges)), out, expect=None)
    if done.code == 0:
        config = json.loads((out / "config.json").read_text())
        built = build_stack(config, "model.layers.{layer}.").layers
        dense = [layer < 4 for first, last in ranges for layer in range(first, last)]
        assert ["DeepseekV3MLP" in str(layer.parts["mlp.class"]) for layer in built] == dense
    else:
        assert done.code == 2 and "first_k_dense_replace" in done.err and not out.exists()


def test_layers_in_their_places_are_never_refused(run, tmp_path):
    for kind in FAMILIES:
        base = make(tmp_path / kind, kind)
        run("merge", recipe(tmp_path, base, "layer_range: [0, 6]"), tmp_path / f"{kind}-out")


def gpt2(folder: Path, **changes) -> Path:
    config = transformers.GPT2Config(n_embd=32, n_head=4, n_layer=6, vocab_size=64, **changes)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


def test_a_function_of_the_layer_s_own_number(run, tmp_path):
    """GPT-2 can divide attention by it: the same layer elsewhere is another one. By default it does not."""
    slices = ["layer_range: [0, 3]", "layer_range: [2, 6]"]
    plain = recipe(tmp_path, gpt2(tmp_path / "plain"), *slices)
    run("merge", plain, tmp_path / "deeper")
    numbered = recipe(tmp_path, gpt2(tmp_path / "numbered", scale_attn_by_inverse_layer_idx=True), *slices)
    done = run("merge", numbered, tmp_path / "out", expect=2)
    assert "scale_attn_by_inverse_layer_idx" in done.err and not (tmp_path / "out").exists()


def unknown(folder: Path, **changes) -> Path:
    """A model that transformers cannot build."""
    make_model(folder, "llama", layers=6)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "unheard_of", **changes}))
    return folder


def test_what_transformers_cannot_build(run, tmp_path):
    """Layers that seem to be of one kind move with a warning; a config that tells them apart is refused by its key."""
    slices = ["layer_range: [0, 3]", "layer_range: [2, 6]"]
    done = run("merge", recipe(tmp_path, unknown(tmp_path / "alike"), *slices), tmp_path / "deeper")
    assert "does not know model_type 'unheard_of'" in done.err and "not checked" in done.err
    apart = unknown(tmp_path / "apart", attn_layer_period=2)
    done = run("merge", recipe(tmp_path, apart, *slices), tmp_path / "out", expect=2)
    assert "attn_layer_period" in done.err and not (tmp_path / "out").exists()
    run("merge", recipe(tmp_path, apart, "layer_range: [0, 6]"), tmp_path / "same")


def test_blocks_for_each_layer_outside_of_the_layers(run, tmp_path):
    """Gemma 3n has one embedding matrix for all layers, as wide as the depth: it does not fit another depth."""
    text = {
        **SMALL, "num_kv_shared_layers": 0, "hidden_size_per_layer_input": 4, "laurel_rank": 4, "altup_num_inputs": 2,
        "vocab_size_per_layer_input": 64, "layer_types": ["full_attention"] * 6, "intermediate_size": [48] * 6,
        "activation_sparsity_pattern": [0.0] * 6,
    }  # fmt: skip
    config = transformers.AutoConfig.for_model("gemma3n_text", **text)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    slices = ["layer_range: [0, 3]", "layer_range: [2, 6]"]
    done = run("merge", recipe(tmp_path, tmp_path / "base", *slices), tmp_path / "out", expect=2)
    assert "per_layer" in done.err and not (tmp_path / "out").exists()
