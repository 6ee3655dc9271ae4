"""What single families have beyond the contract: identities that a config forbids, state between layers, names."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import test_contract
import torch
import transformers
from safetensors.torch import load_file, save_file
from test_contract import align, opened, stored_layers
from tiny_models import COMPOSITES, MODEL_TYPES, config_of, load, logits, make, save, shared, type_of, values_of

from deus_merge import api
from deus_merge.models.family import families
from deus_merge.models.head_layout import layer_heads
from deus_merge.models.view import ModelView


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
        family = opened(folder).view.family
        assert family is not None and set(family.without) == wanted and all(family.without.values())


@pytest.mark.parametrize(
    ("kind", "step"),
    [
        ("bloom", "heads"), ("cohere", "rotary"), ("falcon:sequential", "heads"), ("mpt", "values"),
        ("mpt:plain", "heads"), ("olmo:clipped", "values"), ("olmo:clipped", "rotary"), ("olmoe", "values"),
        ("persimmon", "rotary"), ("phi:norms", "rotary"), ("qwen3_5_text", "values"), ("stablelm:parallel", "heads"),
        ("stablelm:parallel", "rotary"),
    ],
)  # fmt: skip
def test_a_step_that_is_left_out_would_change_the_function(tmp_path, monkeypatch, kind, step):
    source, heads_of = opened(shared(kind)), test_contract.layer_heads
    assert step in source.view.family.without
    monkeypatch.setattr(test_contract, "layer_heads", lambda *a: replace(heads_of(*a), without=frozenset()))
    tensors = load_file(shared(kind) / "model.safetensors")
    pairs = zip(*(stored_layers(opened(shared(kind, seed)), torch.float64) for seed in (0, 7)), strict=True)
    for i, (own, stranger) in enumerate(pairs):
        turned = align(source, i, own, stranger, [step])
        tensors |= {source.view.layers[i][role]: x.contiguous() for role, x in turned.items()}
    save_file({n: x.double() for n, x in tensors.items()}, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_bytes((shared(kind) / "config.json").read_bytes())
    got, want = (logits(load(folder, torch.float64)) for folder in (tmp_path, shared(kind)))
    assert (got - want).abs().max() > 1e-3


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


@pytest.mark.parametrize(
    ("kind", "prefix"),
    [("gemma2", "model."), ("gpt2", "transformer."), ("mamba", "backbone."), ("qwen3_moe", "model.")],
)
def test_a_merge_of_models_with_and_without_the_usual_prefix(run, tmp_path, kind, prefix):
    """Each tensor with its own; the output has the donor's names."""
    models = [tmp_path / "whole", tmp_path / "bare"]
    for seed, folder in enumerate(models):
        tensors = load_file(make(folder, kind, seed, tie_word_embeddings=True) / "model.safetensors")
        renamed = {name.removeprefix(prefix) if seed else name: tensor for name, tensor in tensors.items()}
        save_file(renamed, folder / "model.safetensors", {"format": "pt"})
    means = []
    for donor, other in (models, models[::-1]):
        both = [{"model": str(donor), "parameters": {"weight": 1}}, {"model": str(other), "parameters": {"weight": 3}}]
        (tmp_path / "r.yml").write_text(json.dumps({"merge_method": "linear", "models": both}))
        out = tmp_path / f"out-{donor.name}"
        run("merge", tmp_path / "r.yml", out)
        got, one, two = (
            {n.removeprefix(prefix): x for n, x in load_file(folder / "model.safetensors").items()}
            for folder in (out, donor, other)
        )
        for name, tensor in got.items():
            torch.testing.assert_close(tensor, (one[name] + 3 * two[name]) / 4, rtol=1e-5, atol=1e-6)
        names = [load_file(folder / "model.safetensors").keys() for folder in (out, donor)]
        assert names[0] == names[1]
        means.append(logits(load(out)))
    assert not torch.equal(*means)
    slices = {"merge_method": "linear", "models": both, "tokenizer_source": "base"}
    (tmp_path / "r.yml").write_text(json.dumps(slices))
    assert "tokenizer" in run("merge", tmp_path / "r.yml", tmp_path / "no", expect=2).err


def test_old_words_for_kinds_of_layers_are_no_difference(run, tmp_path):
    """Granite 4 as it is published, and as transformers saves it."""
    base, old = shared("granitemoehybrid"), tmp_path / "old"
    old.mkdir()
    config = config_of(base)
    words = {"linear_attention": "mamba", "full_attention": "attention"}
    kinds = [words[kind] for kind in config["layer_types"]]
    (old / "config.json").write_text(json.dumps({**config, "layer_types": kinds}))
    (old / "model.safetensors").symlink_to(base / "model.safetensors")
    models = [{"model": str(model), "parameters": {"weight": 0.5}} for model in (base, old)]
    (tmp_path / "r.yml").write_text(json.dumps({"merge_method": "linear", "models": models}))
    assert "warning" not in run("merge", tmp_path / "r.yml", tmp_path / "out").err
    assert torch.equal(*(logits(load(folder)) for folder in (tmp_path / "out", base)))


def test_layers_with_a_window_need_one(run, tmp_path):
    """Layers of another model that have a sliding window do not go where the donor's config turns windows off."""
    windows = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}
    models = [shared("qwen2"), make(tmp_path / "windows", "qwen2", 7, **windows)]
    for (first, last), code in (((0, 2), 0), ((3, 5), 2)):
        ranges = zip(models, ([0, 4], [first, last]), strict=True)
        slices = [{"sources": [{"model": str(model), "layer_range": r}]} for model, r in ranges]
        (tmp_path / "r.yml").write_text(json.dumps({"merge_method": "passthrough", "slices": slices}))
        done = run("merge", tmp_path / "r.yml", tmp_path / f"out{first}", expect=code)
        if code:
            assert "config.json's use_sliding_window turns off the window" in done.err
        else:
            assert logits(load(tmp_path / "out0")).isfinite().all()


_TOWER = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16,
    "patch_size": 4, "head_dim": 16,
}  # fmt: skip
_QWEN = COMPOSITES["qwen3_vl_text"][1]
_PARTS = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 0],
                              "partial_rotary_factor": 0.25}}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "text", "vision", "changes", "more"),
    [
        ("gemma3", "gemma3_text", {**_TOWER, "model_type": "siglip_vision_model"}, {}, {"mm_tokens_per_image": 4}),
        ("gemma4", "gemma4_text", _TOWER, {}, {"audio_config": None}),
        ("llava", "llama", {**_TOWER, "num_hidden_layers": 3, "model_type": "clip_vision_model"}, {}, {}),
        ("mistral3", "ministral3", {**_TOWER, "model_type": "pixtral"}, {}, {}),
        ("qwen3_5_moe", "qwen3_5_moe_text", _QWEN, _PARTS, {}),
    ],
)
def test_text_stacks_of_vision_language_models(run, tmp_path, kind, text, vision, changes, more):
    ids = {f"{name}_token_id": 90 + i for i, name in enumerate(("image", "video", "vision_start", "vision_end"))}
    settings = {"model_type": text, **values_of(text), **changes}
    config = transformers.AutoConfig.for_model(kind, text_config=settings, vision_config=dict(vision), **ids, **more)
    save(tmp_path / "base", transformers.AutoModelForImageTextToText.from_config(config))
    view = opened(tmp_path / "base").view
    assert view.family is not None and text in view.family.model_types and view.num_layers == 6
    run("merge", recipe(tmp_path, tmp_path / "base"), tmp_path / "out")
    assert torch.equal(*(logits(load(folder)) for folder in (tmp_path / "out", tmp_path / "base")))


_SIZES = {"hidden_size", "intermediate_size", "vocab_size", "attention_bias", "mlp_bias"}
_USUAL = {"num_hidden_layers", "num_attention_heads", "num_key_value_heads"}


@pytest.mark.parametrize(
    ("kind", "text", "values", "said"),
    [
        ("gemma3", "gemma3_text", {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256},
         {"model_type", "num_hidden_layers", "sliding_window"}),
        ("gemma3", "gemma3_text", {"head_dim": 256}, {"model_type", "sliding_window", *_USUAL}),
        ("gemma3", "gemma3_text", {}, {"head_dim", "sliding_window", *_USUAL}),
        ("llava", "llama", {"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32,
                            "head_dim": 2,
                            "hidden_size": 64}, {"model_type"}),
    ],
)  # fmt: skip
def test_text_parts_that_leave_values_to_transformers(run, tmp_path, kind, text, values, said):
    """Published vision-language models say only what differs from the defaults of the text part's class."""
    settings = {"model_type": text, **values_of(text), **values}
    tower = {**_TOWER, "model_type": "clip_vision_model" if kind == "llava" else "siglip_vision_model"}
    config = transformers.AutoConfig.for_model(kind, text_config=settings, vision_config=tower, image_token_id=90)
    save(tmp_path / "base", transformers.AutoModelForImageTextToText.from_config(config))
    written = config_of(tmp_path / "base")
    written["text_config"] = {k: v for k, v in written["text_config"].items() if k in _SIZES | said}
    (tmp_path / "base/config.json").write_text(json.dumps(written))
    run("merge", recipe(tmp_path, tmp_path / "base", insert={"after": [2]}), tmp_path / "out")
    assert torch.equal(*(logits(load(folder)) for folder in (tmp_path / "out", tmp_path / "base")))
    run("verify", tmp_path / "out", "--strict")
    run("strip", tmp_path / "out", tmp_path / "back")
    assert torch.equal(*(logits(load(folder)) for folder in (tmp_path / "back", tmp_path / "base")))


def test_a_config_without_a_text_part(run, tmp_path):
    """Qwen2.5-VL as it is published: the text part's values at the top, and old names."""
    base = make(tmp_path / "base", "qwen2_5_vl_text")
    config = config_of(base)
    text = config.pop("text_config")
    del text["layer_types"], text["rope_parameters"], text["model_type"]
    rope = {"rope_theta": 1e4, "rope_scaling": {"type": "mrope", "mrope_section": [2, 1, 1]}}
    (base / "config.json").write_text(json.dumps({**text, **config, **rope}))
    tensors = load_file(base / "model.safetensors")
    old = {
        n.replace("model.language_model.", "model.").replace("model.visual.", "visual."): tensors[n] for n in tensors
    }
    save_file(old, base / "model.safetensors", {"format": "pt"})
    run("merge", recipe(tmp_path, base, insert="all"), tmp_path / "out")
    assert torch.equal(*(logits(load(folder)) for folder in (tmp_path / "out", base)))


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


def test_the_default_places_are_the_top_half_where_the_model_refuses_others(run, tmp_path):
    """A warning says so. Places that are named are not changed."""
    base = make(tmp_path / "base", "qwen3_vl_text", deepstack=[0, 1, 2])
    said = run("upscale", base, tmp_path / "out", "--preset", "copy_next", "--verify").err
    assert "in the top half" in said and "deepstack_visual_indexes" in said
    assert torch.equal(seen(tmp_path / "out"), seen(base))
    for named in ("even", "{count: 3, where: even}"):
        message = run("upscale", base, tmp_path / "no", "--preset", "copy_next", "--insert", named, expect=2).err
        assert "deepstack_visual_indexes" in message
    assert api.fit(base, "24GB").insert["where"] == "top"
    base = shared("gemma3n_text")  # which can have no new layer anywhere
    assert "AltUp" in run("upscale", base, tmp_path / "no", expect=2).err and not (tmp_path / "no").exists()


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


#: keys that decide about symmetries, and that a config may leave to transformers' class
LEFT_OUT = ("n_group", "num_expert_group", "partial_rotary_factor", "rotary_pct", "rotary_dim", "rope_parameters")


@pytest.mark.parametrize("kind", sorted({type_of(k) for k in MODEL_TYPES} - {*COMPOSITES}))
def test_what_a_config_leaves_to_its_class_is_known_or_left_out(kind):
    """Groups of experts and rotary components as the class has them, or the step that needs them is not taken."""
    family = next(f for f in families().values() if kind in f.model_types)
    whole = transformers.AutoConfig.for_model(kind).to_dict()
    bare = {key: value for key, value in whole.items() if key not in LEFT_OUT}
    view = ModelView(family, kind, (), "", (), (), ("num_hidden_layers",), specs=({},))
    said, implied = (layer_heads(config, replace(view, family=family.under(config))) for config in (whole, bare))
    if said is None or implied is None:
        return
    assert "experts" in implied.without or implied.expert_groups == said.expert_groups
    unturned = family.rotary == "none" or "rotary" in implied.without
    assert unturned or implied.rotary_size == said.rotary_size
