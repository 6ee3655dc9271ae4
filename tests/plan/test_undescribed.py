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


_SIDES = {
    "vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 3, "num_decoder_layers": 3, "num_heads": 4,
    "encoder_layers": 3, "decoder_layers": 3, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "decoder_start_token_id": 0,
}  # fmt: skip


def two_stacks(folder: Path, model_type: str, **more) -> Path:
    """A model with an encoder and a decoder, both of three layers."""
    torch.manual_seed(0)
    names = transformers.AutoConfig.for_model(model_type).to_dict()
    sizes = {k: v for k, v in _SIDES.items() if k in names or "token" in k}
    model = transformers.AutoModelForSeq2SeqLM.from_config(
        transformers.AutoConfig.for_model(model_type, **sizes, **more)
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder


def grown(folder: Path, base: Path, *modules: str, t: int = 1, layers: tuple[int, int] = (0, 3)) -> Path:
    """A recipe that puts a zero-output copy into every gap of these modules."""
    slices = [
        {
            "merge_method": "ot_fuse",
            "parameters": {"alignment": "none", "t": t},
            "sources": [{"model": str(base), "layer_range": list(layers)}],
        }
    ]
    if layers[0]:
        kept = {"merge_method": "passthrough", "sources": [{"model": str(base), "layer_range": [0, layers[0]]}]}
        slices.insert(0, kept)
    text = json.dumps({"base_model": str(base), "modules": {name: {"slices": slices} for name in modules}})
    (folder / "sides.yml").write_text(text)
    return folder / "sides.yml"


def two_stack_logits(folder: Path, cache: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits for two texts, and tokens that were generated."""
    model, info = transformers.AutoModelForSeq2SeqLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    ids = torch.arange(3, 35)[None]
    with torch.no_grad():
        found = model.eval()(input_ids=ids, decoder_input_ids=ids.flip(1)[:, :20]).logits
        return found, model.generate(ids, max_new_tokens=8, min_new_tokens=8, do_sample=False, use_cache=cache)


#: model_type -> the keys of the depths of encoder and decoder
TWO_STACKS = {
    "t5": ("num_layers", "num_decoder_layers"), "umt5": ("num_layers", "num_decoder_layers"),
    "mbart": ("encoder_layers", "decoder_layers"),
}  # fmt: skip


@pytest.mark.parametrize("modules", [("encoder",), ("decoder",), ("encoder", "decoder")], ids="+".join)
@pytest.mark.parametrize("model_type", TWO_STACKS)
def test_each_stack_of_two_grows_alone(run, tmp_path, model_type, modules):
    """Both are as deep: one must not follow the other, though a config may say one number for both."""
    base = two_stacks(tmp_path / "base", model_type)
    before = json.loads((base / "config.json").read_text())
    forms = [before]
    if model_type == "t5" and len(modules) == 1:
        forms += [{k: v for k, v in before.items() if k != "num_decoder_layers"}, before | {"num_decoder_layers": None}]
    for i, form in enumerate(forms):
        (base / "config.json").write_text(json.dumps(form))
        recipe, out = grown(tmp_path, base, *modules), tmp_path / f"out{i}"
        told = run("merge", recipe, out).err
        cached = model_type == "mbart" or modules != ("decoder",)  # transformers' cache is as deep as T5's encoder
        assert ("use_cache=False" in told) != cached
        ours, theirs = two_stack_logits(out, cached), two_stack_logits(base, cached)
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
        after = json.loads((out / "config.json").read_text())
        depths = {
            k: 5 if m in modules else 3 for m, k in zip(("encoder", "decoder"), TWO_STACKS[model_type], strict=True)
        }
        plain = {"num_hidden_layers": depths["encoder_layers"]} if "num_hidden_layers" in before else {}
        assert after == before | depths | plain
    assert run("verify", out, "--json").json()["passed"]


def test_the_layer_that_others_read_positions_from_is_not_copied(run, tmp_path):
    """T5's first layer computes the positions of all: it stays the only one of its kind; others can be copied."""
    base = two_stacks(tmp_path / "base", "t5")
    planned = run("plan", grown(tmp_path, base, "decoder"), "--json").json()
    assert planned["function_preserving"] and planned["num_layers"] == 5
    told = run("merge", grown(tmp_path, base, "decoder", t=0), tmp_path / "out", expect=2).err
    assert "cannot start as the identity: layer 0: layer 0 reaches the rest of the model by more" in told
    run("merge", grown(tmp_path, base, "encoder", t=0, layers=(1, 3)), tmp_path / "upper")
    assert torch.equal(two_stack_logits(tmp_path / "upper")[0], two_stack_logits(base)[0])


def test_a_decoder_that_followed_the_encoder_comes_out_again(run, tmp_path):
    base = two_stacks(tmp_path / "base", "t5")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "num_decoder_layers"}))
    run("merge", grown(tmp_path, base, "decoder"), tmp_path / "out")
    run("strip", tmp_path / "out", tmp_path / "back")
    assert json.loads((tmp_path / "back/config.json").read_text()) == json.loads((base / "config.json").read_text())
    assert (tmp_path / "back/model.safetensors").read_bytes() == (base / "model.safetensors").read_bytes()


def test_an_encoder_alone_grows(run, tmp_path):
    base = tmp_path / "base"
    sizes = {k: v for k, v in _SIDES.items() if k in transformers.T5Config().to_dict()}
    transformers.T5EncoderModel(transformers.T5Config(**sizes)).save_pretrained(base)
    text = {"base_model": str(base), "upscale": {"preset": "copy_next", "insert": "all"}}
    (tmp_path / "r.yml").write_text(json.dumps(text))
    run("merge", tmp_path / "r.yml", tmp_path / "out")
    models = [transformers.T5EncoderModel.from_pretrained(folder).eval() for folder in (base, tmp_path / "out")]
    before, after = (model(torch.arange(3, 35)[None])[0] for model in models)
    assert torch.equal(before, after) and len(models[1].encoder.block) == 5


def test_a_norm_behind_the_sum_is_refused_in_each_stack(run, tmp_path):
    base = two_stacks(tmp_path / "base", "bart")
    for module in ("encoder", "decoder"):
        told = run("merge", grown(tmp_path, base, module), tmp_path / "out", expect=2).err
        assert "cannot start as the identity: layer 0" in told and "it is not x + f(x)" in told
        assert "passthrough" in told and not (tmp_path / "out").exists()
    text = (
        (tmp_path / "sides.yml")
        .read_text()
        .replace("ot_fuse", "passthrough")
        .replace('"t": 1', "")
        .replace('"alignment": "none", ', "")
    )
    (tmp_path / "sides.yml").write_text(text)
    run("merge", tmp_path / "sides.yml", tmp_path / "out")


def test_a_stack_that_tokens_do_not_reach_is_refused(run, tmp_path):
    """Whisper's encoder takes sounds: no small model is run, and a decoder without it proves nothing."""
    sizes = {"num_mel_bins": 8, "max_source_positions": 32, "max_target_positions": 64}
    config = transformers.WhisperConfig(**{k: v for k, v in _SIDES.items() if "num" not in k}, **sizes)
    transformers.WhisperForConditionalGeneration(config).save_pretrained(tmp_path / "base")
    for module, words in (("encoder", "has no encoder"), ("decoder", "is not used where a model reads nothing but")):
        told = run("merge", grown(tmp_path, tmp_path / "base", module), tmp_path / "out", expect=2).err
        assert words in told and not (tmp_path / "out").exists()


def test_a_preset_says_what_to_write_for_two_stacks(run, tmp_path):
    """The hint is a recipe that works."""
    base = two_stacks(tmp_path / "base", "mbart")
    told = run("merge", recipe(tmp_path, base, "llama_pro"), tmp_path / "out", expect=2).err
    assert "several stacks of layers" in told
    hint = next(line for line in told.splitlines() if "hint:" in line).partition("hint:")[2].strip()
    (tmp_path / "hint.yml").write_text(f"base_model: {base}\n{hint}\n")
    run("merge", tmp_path / "hint.yml", tmp_path / "out")
    assert torch.equal(two_stack_logits(tmp_path / "out")[0], two_stack_logits(base)[0])
