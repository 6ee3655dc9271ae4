"""What single families have beyond the contract: identities that a config forbids, state between layers, names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import config_of, load, logits, make, shared

from deus_merge.models.reference import ModelRef
from deus_merge.models.source import SourceModel


def recipe(folder: Path, base: Path, preset: str = "opt_deus", insert: object = "top_half") -> Path:
    path = folder / "recipe.yml"
    path.write_text(json.dumps({"base_model": str(base), "upscale": {"preset": preset, "insert": insert}}))
    return path


@pytest.mark.parametrize(
    ("kind", "changes", "words"),
    [
        ("bloom", {"apply_residual_connection_post_layernorm": True}, "cannot start as the identity"),
        ("opt", {"do_layer_norm_before": False}, "cannot start as the identity"),
        ("gemma4_text", {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 96},
         "hidden_size_per_layer_input"),
        ("gemma4_text", {"num_kv_shared_layers": 3, "use_double_wide_mlp": True}, "num_kv_shared_layers"),
    ],
)  # fmt: skip
def test_what_no_zeros_can_keep_is_refused_and_the_rest_merges(run, tmp_path, kind, changes, words):
    base, other = (make(tmp_path / name, kind, seed, **changes) for seed, name in enumerate("ab"))
    assert words in run("merge", recipe(tmp_path, base), tmp_path / "no", expect=2).err
    assert not (tmp_path / "no").exists()
    models = [{"model": str(m), "parameters": {"weight": 0.5}} for m in (base, other)]
    (tmp_path / "linear.yml").write_text(json.dumps({"merge_method": "linear", "models": models}))
    run("merge", tmp_path / "linear.yml", tmp_path / "out")
    mean, a, b = (dict(load(folder).named_parameters()) for folder in (tmp_path / "out", base, other))
    for name in a:
        torch.testing.assert_close(mean[name], (a[name] + b[name]) / 2, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("kind", "change", "now", "usual"),
    [
        ("olmo", {"clip_qkv": 0.3}, {"values", "rotary"}, set()),
        ("mpt", {"attn_config": {"clip_qkv": 0.3}}, {"heads", "values"}, {"heads", "values"}),
        ("mpt", {"attn_config": {}}, {"heads"}, {"heads", "values"}),
        ("falcon", {"alibi": True}, {"heads"}, set()),
        ("stablelm", {"qk_layernorm": True}, {"heads", "rotary"}, set()),
        ("phi", {"qk_layernorm": True}, {"rotary"}, set()),
    ],
)
def test_symmetries_that_a_config_takes_away(tmp_path, kind, change, now, usual):
    for folder, wanted in ((make(tmp_path / "changed", kind, **change), now), (shared(kind), usual)):
        family = SourceModel.open(ModelRef(str(folder)), {}).view.family
        assert family is not None and set(family.without) == wanted and all(family.without.values())


@pytest.mark.parametrize(
    ("kind", "prefix"),
    [("bloom", "transformer."), ("gpt2", "transformer."), ("opt", "model."), ("mistral", "model.")],
)
def test_names_without_the_usual_prefix(run, tmp_path, kind, prefix):
    base = tmp_path / "base"
    base.mkdir()
    tensors = load_file(shared(kind) / "model.safetensors")
    renamed = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    assert renamed.keys() != tensors.keys()
    save_file(renamed, base / "model.safetensors", {"format": "pt"})
    (base / "config.json").write_text(json.dumps(config_of(shared(kind))))
    run("merge", recipe(tmp_path, base, insert="all"), tmp_path / "out")
    assert renamed.keys() < load_file(tmp_path / "out/model.safetensors").keys()
    assert torch.equal(logits(load(tmp_path / "out")), logits(load(shared(kind))))


def seen(folder: Path) -> torch.Tensor:
    """Logits of a text with an image of 4 x 4 patches, which are 4 tokens."""
    ids = torch.tensor([[5, 92, 90, 90, 90, 90, 93, 6, 7]])
    pixels = torch.randn(16, 48, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return load(folder)(
            ids, pixel_values=pixels, image_grid_thw=torch.tensor([[1, 4, 4]]), mm_token_type_ids=(ids == 90).int()
        ).logits


def test_layers_that_vision_features_enter_after_keep_their_numbers(run, tmp_path):
    base = make(tmp_path / "base", "qwen3_vl_text", deepstack=[0, 1])
    run("merge", recipe(tmp_path, base), tmp_path / "out")
    assert torch.equal(seen(tmp_path / "out"), seen(base))
    message = run("merge", recipe(tmp_path, base, "llama_pro", "all"), tmp_path / "no", expect=2).err
    assert "deepstack_visual_indexes" in message


@pytest.mark.parametrize("kind", ["deepseek_v3", "glm4_moe"])
def test_prediction_layers_stay_behind_the_last_layer(run, tmp_path, kind):
    """Stored as ``model.layers.6`` behind layers 0 to 5, they are no layer, and are numbered anew."""
    base = make(tmp_path / "base", kind)
    tensors = load_file(base / "model.safetensors")
    behind = {n.replace(".5.", ".6.", 1): x.clone() for n, x in tensors.items() if n.startswith("model.layers.5.")}
    behind |= {"model.layers.6.eh_proj.weight": torch.rand(32, 64), "model.layers.6.enorm.weight": torch.rand(32)}
    save_file({**tensors, **behind}, base / "model.safetensors", {"format": "pt"})
    assert config_of(base)["num_nextn_predict_layers"] == 1
    run("merge", recipe(tmp_path, base, insert="all"), tmp_path / "out")
    written = load_file(tmp_path / "out/model.safetensors")
    for name, tensor in behind.items():
        assert torch.equal(written.pop(name.replace(".6.", ".11.", 1)), tensor)
    assert not any(name.startswith("model.layers.11.") for name in written)
    save_file(written, tmp_path / "out/model.safetensors", {"format": "pt"})
    assert torch.equal(logits(load(tmp_path / "out")), logits(load(shared(kind))))


def test_deepseek_v4_as_it_is_published(run, tmp_path):
    base = make(tmp_path / "base", "deepseek_v4")
    renamed = {"model.embed_tokens.": "embed.", "model.hc_head.hc_": "hc_head_", "model.": ""}

    def published(name: str) -> str:
        old = next((prefix for prefix in renamed if name.startswith(prefix)), None)
        return name if old is None else renamed[old] + name.removeprefix(old)

    tensors = {published(name): x for name, x in load_file(base / "model.safetensors").items()}
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    run("merge", recipe(tmp_path, base, "average", "all"), tmp_path / "out")
    run("merge", recipe(tmp_path, shared("deepseek_v4"), "average", "all"), tmp_path / "usual")
    assert "embed.weight" in load_file(tmp_path / "out/model.safetensors")
    assert torch.equal(logits(load(tmp_path / "out")), logits(load(tmp_path / "usual")))


def test_a_depth_that_only_a_list_says_comes_back(run, tmp_path):
    base = shared("nemotron_h")
    assert "num_hidden_layers" not in config_of(base)
    run("merge", recipe(tmp_path, base, insert="all"), tmp_path / "out")
    assert len(config_of(tmp_path / "out")["layers_block_type"]) == 15
    run("strip", tmp_path / "out", tmp_path / "back")
    assert config_of(tmp_path / "back") == config_of(base)
    assert load_file(tmp_path / "back/model.safetensors").keys() == load_file(base / "model.safetensors").keys()
