"""`strip` is the way back: what was put in comes out, and the base is there again, byte for byte."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from support import FAMILIES, load, make_model, weights

from deus_merge import api
from deus_merge.recipe.presets import PRESETS

QUIET = api.RunOptions(verify=False)


def grow(base: Path, out: Path, preset: str, insert: object = None, **options) -> Path:
    api.merge(api.upscale_recipe(base, preset=preset, insert=insert, **options), out, QUIET)
    return out


def same_model(one: Path, other: Path, names: tuple[str, ...] = ("config.json", "model.safetensors")) -> None:
    for name in names:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    family=st.sampled_from(sorted(FAMILIES)),
    layers=st.integers(2, 5),
    tied=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    preset=st.sampled_from(["copy_next", "llama_pro", "average", "opt_deus"]),
    data=st.data(),
)
def test_base_comes_back_byte_for_byte(tmp_path_factory, family, layers, tied, dtype, preset, data):
    folder = tmp_path_factory.mktemp("law")
    base = make_model(folder / "base", family, layers=layers, tied=tied, dtype=dtype)
    gaps = data.draw(st.sets(st.integers(0, layers - 2), min_size=1))
    out = grow(base, folder / "out", preset, {"after": sorted(gaps)})
    done = api.strip(out, folder / "back")
    same_model(base, folder / "back", ("config.json", "model.safetensors", "generation_config.json"))
    assert (done.equal, done.different, done.same_files) == (len(weights(base)), (), True)
    assert done.num_layers == layers and len(done.removed) == len(gaps)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_with_its_tokenizer(run, tiny, tmp_path, preset):
    """Also solar and stack: the base's layers are all in them, in order."""
    out = grow(tiny, tmp_path / "out", preset)
    reported = run("strip", out, tmp_path / "back", "--json").json()
    assert reported["same_files"] is True and reported["num_layers"] == 6
    documents = {"README.md", "TRAINING.md"}
    assert {p.name for p in (tmp_path / "back").iterdir()} == {p.name for p in tiny.iterdir()} - documents
    for file in (tmp_path / "back").iterdir():
        same_model(tiny, tmp_path / "back", (file.name,))


def test_lists_of_the_config_come_back(run, tmp_path):
    """Written lists are shortened; a number that implies kinds is as it was; an added dtype goes."""
    kinds = ["full_attention", "sliding_attention", "full_attention", "full_attention"]
    mixed = make_model(tmp_path / "mixed", "qwen3", layer_types=kinds, use_sliding_window=True, sliding_window=8)
    implied = make_model(tmp_path / "implied", "qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=2)
    config = json.loads((implied / "config.json").read_text())
    del config["layer_types"], config["dtype"]
    (implied / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for base in (mixed, implied):
        out = grow(base, tmp_path / f"{base.name}-out", "copy_next", "all", dtype="float32")
        grown = json.loads((out / "config.json").read_text())
        assert len(grown["layer_types"]) == 7 if base == mixed else grown["max_window_layers"] == 3
        run("strip", out, tmp_path / f"{base.name}-back")
        same_model(base, tmp_path / f"{base.name}-back")


def test_files_of_the_base_may_be_many(run, tmp_path):
    base = make_model(tmp_path / "base", max_shard_size="60KB")
    out = grow(base, tmp_path / "out", "copy_next")
    done = run("strip", out, tmp_path / "back", "--max-shard-size", "60kB", "--json").json()
    assert done["different"] == [] and done["equal_to_base"] == len(weights(base)) and not done["same_files"]
    assert (tmp_path / "back/model.safetensors.index.json").is_file()
    ids = torch.arange(3, 30)[None]
    assert torch.equal(load(base)(ids).logits, load(tmp_path / "back")(ids).logits)


def test_trained_folders(run, tmp_path):
    """As a trainer saves them: no manifest, all layers trained, another dtype, lists that transformers added."""
    base = make_model(tmp_path / "base", "qwen3", dtype=torch.bfloat16)
    config = json.loads((base / "config.json").read_text())
    del config["layer_types"]
    (base / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    out = grow(base, tmp_path / "out", "opt_deus")
    model = load(out)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)
    model.save_pretrained(tmp_path / "trained")
    assert "no manifest" in run("strip", tmp_path / "trained", tmp_path / "back", expect=2).err
    done = run("strip", tmp_path / "trained", tmp_path / "back", "--manifest", out)
    assert "0 tensors equal to the base" in done.err
    back = transformers.AutoConfig.from_pretrained(tmp_path / "back")
    assert (back.num_hidden_layers, back.layer_types, back.dtype) == (4, ["full_attention"] * 4, torch.float32)
    ours, trained = weights(tmp_path / "back"), weights(tmp_path / "trained")
    assert ours.keys() == weights(base).keys()
    for new, old in enumerate((0, 2, 3, 5)):
        for name in (n for n in ours if n.startswith(f"model.layers.{new}.")):
            assert ours[name].equal(trained[name.replace(f".{new}.", f".{old}.", 1)]), name
    assert ours["model.embed_tokens.weight"].equal(trained["model.embed_tokens.weight"])
    load(tmp_path / "back")


def test_extended_embeddings_stay(run, tmp_path):
    """They are no part of the growth: the base comes back with the vocabulary that the model now has."""
    base = make_model(tmp_path / "base", tied=True)
    out = grow(base, tmp_path / "out", "copy_next")
    model = load(out)
    model.resize_token_embeddings(140)
    model.save_pretrained(tmp_path / "trained")
    done = run("strip", tmp_path / "trained", tmp_path / "back", "--manifest", out / "deus_merge.json", "--json").json()
    assert done["different"] == ["model.embed_tokens.weight"]
    assert load(tmp_path / "back").get_input_embeddings().weight.shape == (140, 32)


def test_a_family_that_nobody_described(run, tmp_path):
    gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=8, n_head=2, n_layer=2, vocab_size=32))
    gpt2.save_pretrained(tmp_path / "base")
    out = grow(tmp_path / "base", tmp_path / "out", "stack")
    run("strip", out, tmp_path / "back")
    same_model(tmp_path / "base", tmp_path / "back")


def test_a_base_that_was_cast_or_is_gone(run, tmp_path):
    base = make_model(tmp_path / "base")
    out = grow(base, tmp_path / "out", "copy_next", dtype="bfloat16")
    done = run("strip", out, tmp_path / "back", "--json").json()
    assert len(done["different"]) == len(weights(base)) and done["equal_to_base"] == 0
    assert json.loads((tmp_path / "back/config.json").read_text())["dtype"] == "bfloat16"  # as the tensors are
    load(tmp_path / "back")
    shutil.move(base, tmp_path / "elsewhere")
    assert run("strip", out, tmp_path / "again", "--json").json()["equal_to_base"] is None
    same_model(tmp_path / "back", tmp_path / "again")


REFUSED = {
    "cut": ("slices:\n  - sources: [{model: base, layer_range: [0, 3]}]\n", "layers 0 to 3"),
    "another order": (
        "slices:\n  - sources: [{model: base, layer_range: [2, 4]}]\n"
        "  - sources: [{model: base, layer_range: [0, 2]}]\n",
        "[2, 3, 0, 1]",
    ),
    "merged": (
        "merge_method: linear\nslices:\n  - sources: [{model: base, layer_range: [0, 4], parameters: {weight: 1}},"
        " {model: other, layer_range: [0, 4], parameters: {weight: 1}}]\n",
        "layer 0 is compute of 2 layers",
    ),
    "copied, but from another model": (
        "merge_method: linear\nslices:\n  - sources: [{model: base, layer_range: [0, 4], parameters: {weight: 0}},"
        " {model: other, layer_range: [0, 4], parameters: {weight: 1}}]\n",
        "layer 0 is copy of 2 layers",
    ),
    "another model's layers": ("slices:\n  - sources: [{model: other, layer_range: [0, 4]}]\n", "the layers of base"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_the_base_with_layers_added(run, tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    make_model(tmp_path / "base")
    make_model(tmp_path / "other", seed=1)
    slices, reported = REFUSED[case]
    pair = "{model: base, layer_range: [0, 1]}, {model: base, layer_range: [1, 2]}"
    new = f"  - merge_method: ot_fuse\n    sources: [{pair}]\n"
    method = "" if "merge_method" in slices else "merge_method: passthrough\n"
    Path("recipe.yml").write_text(f"base_model: base\n{method}{slices}{new}")
    api.merge("recipe.yml", tmp_path / "out", QUIET)
    error = run("strip", "out", "back", expect=2).err
    assert "not all there" in error and reported in error
    assert not Path("back").exists()


def test_what_strip_does_not_take(run, tmp_path):
    base = make_model(tmp_path / "base")
    out = grow(base, tmp_path / "out", "copy_next")
    assert "no manifest" in run("strip", base, tmp_path / "back", expect=2).err
    other = grow(make_model(tmp_path / "deep", layers=5), tmp_path / "other", "copy_next")
    error = run("strip", out, tmp_path / "back", "--manifest", other, expect=2).err
    assert "not this checkpoint's" in error and "7 layers with 63 tensors" in error
    biased = grow(make_model(tmp_path / "bias", "llama_bias"), tmp_path / "biased", "copy_next")
    assert "odd: model.layers.0." in run("strip", out, tmp_path / "back", "--manifest", biased, expect=2).err
    assert "must not contain each other" in run("strip", out, out / "inside", expect=2).err
    before = (base / "model.safetensors").read_bytes()
    for options in ((), ("--overwrite",)):
        assert "a model that it was made from" in run("strip", out, base, *options, expect=2).err
    assert (base / "model.safetensors").read_bytes() == before
    plain = tmp_path / "plain.yml"
    plain.write_text(f"merge_method: passthrough\nmodels: [{{model: {base}}}]\n")
    api.merge(plain, tmp_path / "plain", QUIET)
    assert "no new layer to remove" in run("strip", tmp_path / "plain", tmp_path / "back", expect=2).err
    tensors = weights(out)
    del tensors["model.layers.3.mlp.up_proj.weight"]
    damaged = Path(shutil.copytree(out, tmp_path / "damaged"))
    save_file(tensors, damaged / "model.safetensors", {"format": "pt"})
    assert "layer 3 lacks its 'up' tensor" in run("strip", damaged, tmp_path / "back", expect=2).err
    old = json.loads((out / "deus_merge.json").read_text()) | {"format": 1}
    del old["donor_config"]
    (damaged / "deus_merge.json").write_text(json.dumps(old))
    assert "lacks 'donor_config'" in run("strip", damaged, tmp_path / "back", expect=2).err
    assert not (tmp_path / "back").exists() and not list(tmp_path.glob(".back*tmp"))


def test_strip_replaces_only_with_overwrite(run, tmp_path):
    base = make_model(tmp_path / "base")
    out = grow(base, tmp_path / "out", "copy_next")
    run("strip", out, tmp_path / "back")
    run("strip", out, tmp_path / "back", expect=2)
    run("strip", out, tmp_path / "back", "--overwrite")
    same_model(base, tmp_path / "back")


def test_a_model_that_was_grown_twice_is_stripped_twice(run, tmp_path):
    """The manifest of the first growth comes along, with what strip wrote; and every check of it passes."""
    base = make_model(tmp_path / "base")
    run("upscale", base, tmp_path / "once", "--preset", "copy_next", "--insert", "{after: [1]}")
    run("upscale", tmp_path / "once", tmp_path / "twice", "--preset", "opt_deus", "--insert", "{after: [0, 3]}")
    assert "can be stripped again" in run("strip", tmp_path / "twice", tmp_path / "again").err
    same_model(tmp_path / "once", tmp_path / "again", ("config.json", "model.safetensors", "deus_merge.yml"))
    checks = {c["name"]: c["passed"] for c in run("verify", tmp_path / "again", "--json").json()["checks"]}
    assert checks["checksums"] and checks["other files"] and checks["zeroed tensors"] and checks["files and headers"]
    run("strip", tmp_path / "again", tmp_path / "back")
    same_model(base, tmp_path / "back")
    before = (base / "model.safetensors").read_bytes()
    for source in (base, tmp_path / "once"):  # also what it was grown from before, and where the manifest is
        options = ("--manifest", tmp_path / "twice", "--overwrite")
        assert "was made from" in run("strip", tmp_path / "twice", source, *options, expect=2).err
    assert "was made from" in run("strip", tmp_path / "again", tmp_path / "twice", *options, expect=2).err
    assert (base / "model.safetensors").read_bytes() == before


def test_a_base_that_cannot_be_compared_or_was_cast(run, tmp_path):
    """Weights that are not read are as good as gone; a manifest is carried only to weights that it is true of."""
    base = make_model(tmp_path / "base")
    torch.save(weights(base), base / "pytorch_model.bin")
    (base / "model.safetensors").rename(tmp_path / "weights")
    run("upscale", base, tmp_path / "once", "--preset", "copy_next", "--allow-pickle")
    assert run("strip", tmp_path / "once", tmp_path / "back", "--json").json()["equal_to_base"] is None
    once = tmp_path / "once"
    run("upscale", once, tmp_path / "half", "--insert", "{after: [0]}", "--dtype", "bfloat16")
    assert run("strip", tmp_path / "half", tmp_path / "cast", "--json").json()["manifest"] is False
    assert not (tmp_path / "cast/deus_merge.json").exists()


def test_a_base_with_an_adapter_has_no_manifest_of_its_own(run, tmp_path, monkeypatch):
    """A growth of a grown model with an adapter: no folder holds the base, so its manifest cannot be copied."""
    peft = pytest.importorskip("peft")
    base = make_model(tmp_path / "base")
    once = grow(base, tmp_path / "once", "copy_next")
    config = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    peft.get_peft_model(load(once), config).save_pretrained(tmp_path / "adapter")
    run("upscale", f"{once}+{tmp_path / 'adapter'}", tmp_path / "twice", "--insert", "{after: [0]}")
    monkeypatch.chdir(base)  # a folder without a manifest
    assert run("strip", tmp_path / "twice", tmp_path / "back", "--json").json()["manifest"] is False
    assert not (tmp_path / "back/deus_merge.json").exists()
