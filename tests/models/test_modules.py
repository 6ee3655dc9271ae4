"""``modules:`` of recipes: one stack of layers, or several, each with slices of its own."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from support import make_model, weights, write_recipe

from deus_merge import api

_TEXT = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip
_EYES = {
    "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 6, "num_attention_heads": 2, "image_size": 16,
    "patch_size": 8,
}  # fmt: skip
_SIDES = {
    "vocab_size": 64, "d_model": 32, "encoder_layers": 3, "decoder_layers": 2, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_source_positions": 32,
    "max_target_positions": 32, "num_mel_bins": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "decoder_start_token_id": 1,
}  # fmt: skip


def llava():
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**_TEXT), vision_config=transformers.CLIPVisionConfig(**_EYES),
        image_token_index=5, vision_feature_layer=2,
    )  # fmt: skip
    return transformers.LlavaForConditionalGeneration(config)


def qwen2_vl():
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    eyes = {"depth": 6, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4}
    config = transformers.Qwen2VLConfig(text_config={**_TEXT, "rope_parameters": rope}, vision_config=eyes)
    return transformers.Qwen2VLForConditionalGeneration(config)


def gemma3():
    config = transformers.Gemma3Config(
        text_config={**_TEXT, "head_dim": 8}, vision_config=_EYES, mm_tokens_per_image=1, image_token_index=5,
        boi_token_index=6, eoi_token_index=7,
    )  # fmt: skip
    return transformers.Gemma3ForConditionalGeneration(config)


def whisper():
    return transformers.WhisperForConditionalGeneration(transformers.WhisperConfig(**_SIDES))


def t5():
    sizes = {"d_model": 32, "d_ff": 48, "num_layers": 3, "num_decoder_layers": 2, "num_heads": 4, "d_kv": 8}
    return transformers.T5ForConditionalGeneration(transformers.T5Config(vocab_size=64, **sizes))


MAKE = {"llava": llava, "qwen2_vl": qwen2_vl, "gemma3": gemma3, "whisper": whisper, "t5": t5}
#: family -> module -> (prefix of its layers, the place of its depth)
MODULES = {
    "llava": {
        "text_decoder": ("language_model.model.layers", ("text_config", "num_hidden_layers")),
        "vision_tower": ("vision_tower.encoder.layers", ("vision_config", "num_hidden_layers")),
    },
    "qwen2_vl": {
        "text_decoder": ("model.layers", ("text_config", "num_hidden_layers")),
        "vision_tower": ("visual.blocks", ("vision_config", "depth")),
    },
    "gemma3": {
        "text_decoder": ("language_model.model.layers", ("text_config", "num_hidden_layers")),
        "vision_tower": ("vision_tower.encoder.layers", ("vision_config", "num_hidden_layers")),
    },
    "whisper": {
        "encoder": ("model.encoder.layers", ("encoder_layers",)),
        "decoder": ("model.decoder.layers", ("decoder_layers",)),
    },
    "t5": {
        "encoder": ("encoder.block", ("num_layers",)),
        "decoder": ("decoder.block", ("num_decoder_layers",)),
    },
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Family -> two models of it."""
    root, built = tmp_path_factory.mktemp("modules"), {}

    def get(family: str):
        if family not in built:
            for seed, name in enumerate(("one", "two")):
                torch.manual_seed(seed)
                MAKE[family]().save_pretrained(root / family / name)
            built[family] = (root / family / "one", root / family / "two")
        return built[family]

    return get


def loaded(folder, family):
    """The model by transformers, which must find every tensor and miss none."""
    kind = type(MAKE[family]())
    model, info = kind.from_pretrained(folder, output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model.eval()


def config_at(folder, path):
    value = json.loads((folder / "config.json").read_text())
    for key in path:
        value = value[key]
    return value


@pytest.mark.parametrize("family", MAKE)
def test_each_module_has_slices_of_its_own(run, models, tmp_path, family):
    """One module alone, then the other one too; what is not named is the donor's."""
    one, _ = models(family)
    base, (first, second) = weights(one), MODULES[family].items()
    text = f"merge_method: passthrough\nbase_model: {one}\nmodules:\n"
    deeper = f"    slices:\n      - sources: [{{model: {one}, layer_range: [0, 2]}}]\n" + (
        f"      - sources: [{{model: {one}, layer_range: [1, 2]}}]\n" * 2
    )
    recipe = write_recipe(tmp_path / "r.yml", f"{text}  {second[0]}:\n{deeper}")
    run("merge", recipe, tmp_path / "second")
    write_recipe(recipe, f"{text}  {second[0]}:\n{deeper}  {first[0]}:\n{deeper}")
    run("merge", recipe, tmp_path / "both")
    for out, modules in (("second", [second]), ("both", [first, second])):
        ours = weights(tmp_path / out)
        loaded(tmp_path / out, family)
        for _, (prefix, path) in modules:
            assert config_at(tmp_path / out, path) == 4
            for name in (n for n in base if n.startswith(f"{prefix}.1.")):
                for layer in (2, 3):
                    assert ours.pop(name.replace(f"{prefix}.1.", f"{prefix}.{layer}.")).equal(base[name])
        rest = {n: t for n, t in base.items() if not any(n.startswith(f"{p}.") for _, (p, _) in modules)}
        assert all(ours[name].equal(tensor) for name, tensor in rest.items())
        assert all(tensor.equal(base[name]) for name, tensor in ours.items())
    record = json.loads((tmp_path / "both/deus_merge.json").read_text())
    assert record["num_layers"] == 4 and [m["num_layers"] for m in record["modules"].values()] == [4]
    assert run("verify", tmp_path / "both", "--json").json()["passed"]
    again = run("plan", tmp_path / "both/deus_merge.yml", "--json").json()
    assert again["plan_hash"] == record["plan_hash"]


def test_one_module_is_merged(run, models, tmp_path):
    """With its tensors outside layers; parameters of the module come after a slice's and before the recipe's."""
    one, two = models("llava")
    recipe = write_recipe(
        tmp_path / "r.yml",
        f"merge_method: linear\nbase_model: {one}\nparameters: {{weight: 5, normalize: true}}\nmodules:\n"
        f"  vision_tower:\n    models: [{{model: {one}}}, {{model: {two}, parameters: {{weight: 3}}}}]\n"
        "    parameters: {weight: [{filter: mlp, value: 1}]}\n"
        f"  multi_modal_projector:\n    models: [{{model: {one}}}, {{model: {two}}}]\n",
    )
    run("merge", recipe, tmp_path / "out")
    a, b, ours = weights(one), weights(two), weights(tmp_path / "out")
    for name, tensor in ours.items():
        weight = {"vision_tower": (1, 3) if "mlp" in name else (5, 3), "multi_modal_projector": (5, 5)}
        u, v = weight.get(name.partition(".")[0], (1, 0))
        torch.testing.assert_close(tensor, (u * a[name] + v * b[name]) / (u + v), rtol=1e-6, atol=1e-6)


def test_new_layers_come_out_again(run, models, tmp_path):
    """Those of the text decoder; not where the vision tower has others too."""
    one, _ = models("llava")
    text = f"base_model: {one}\nmerge_method: passthrough\nmodules:\n"
    decoder = f"  text_decoder:\n    slices: [{{merge_method: ot_fuse, sources: [{{model: {one}}}]}}]\n"
    tower = f"  vision_tower:\n    slices: [{{sources: [{{model: {one}}}]}}, {{sources: [{{model: {one}}}]}}]\n"
    run("merge", write_recipe(tmp_path / "r.yml", text + decoder), tmp_path / "out")
    run("strip", tmp_path / "out", tmp_path / "back")
    assert (tmp_path / "back/config.json").read_bytes() == (one / "config.json").read_bytes()
    back = weights(tmp_path / "back")
    assert back.keys() == weights(one).keys() and all(t.equal(back[n]) for n, t in weights(one).items())
    run("merge", write_recipe(tmp_path / "r.yml", text + decoder + tower), tmp_path / "both")
    assert "vision_tower is not that of" in run("strip", tmp_path / "both", tmp_path / "no", expect=2).err


@pytest.mark.parametrize("form", ["modules", "upscale"])
def test_a_described_text_decoder_gets_new_layers(run, models, tmp_path, form):
    """ot_fuse knows the roles of LLaVA's language model, which is a Llama: the function stays."""
    one, _ = models("llava")
    sources = f"sources: [{{model: {one}, layer_range: [0, 4]}}]"
    text = {
        "modules": f"modules: {{text_decoder: {{slices: [{{merge_method: ot_fuse, {sources}}}]}}}}",
        "upscale": "upscale: {insert: all}",
    }[form]
    recipe = write_recipe(tmp_path / "r.yml", f"base_model: {one}\n{text}\n")
    planned = run("plan", recipe, "--json").json()
    assert planned["num_layers"] == 7 and planned["new_layers"] == [1, 3, 5] and planned["function_preserving"]
    run("merge", recipe, tmp_path / "out")
    ids = torch.arange(10, 40)[None]
    with torch.no_grad():
        ours, theirs = (loaded(folder, "llava")(input_ids=ids).logits for folder in (tmp_path / "out", one))
    assert ours.equal(theirs)


@pytest.mark.parametrize(
    "body",
    [
        "models: [{model: BASE}, {model: OTHER}]",
        "slices: [{sources: [{model: BASE, layer_range: [0, 2]}, {model: OTHER, layer_range: [1, 3]}]}]",
    ],
)
def test_default_means_the_same_as_the_top_level(run, tmp_path, body):
    for seed, name in enumerate(("base", "other")):
        make_model(tmp_path / name, layers=3, seed=seed)
    body = body.replace("BASE", str(tmp_path / "base")).replace("OTHER", str(tmp_path / "other"))
    weight = "parameters: {weight: [0.2, 0.9]}"
    plain = write_recipe(tmp_path / "plain.yml", f"merge_method: linear\n{body}\n{weight}\n")
    module = write_recipe(tmp_path / "m.yml", f"merge_method: linear\nmodules: {{default: {{{body}, {weight}}}}}\n")
    hashes = [run("plan", recipe, "--json").json()["plan_hash"] for recipe in (plain, module)]
    expanded = write_recipe(tmp_path / "e.yml", run("plan", module, "--expand", "--private-paths").out)
    assert hashes[0] == hashes[1] == run("plan", expanded, "--json").json()["plan_hash"]


SLICE = "slices: [{sources: [{model: ONE, layer_range: [0, 2]}]}]"
NEW = "slices: [{merge_method: ot_fuse, parameters: {alignment: none, t: 1}, sources: [{model: ONE}]}]"
WRONG = {
    "unknown": ("llava", f"modules: {{vision_towr: {{{SLICE}}}}}", "modules.vision_towr (line 3): the model has",
                "text_decoder | vision_tower | multi_modal_projector", "did you mean 'vision_tower'?"),
    "only default": ("llama", f"modules: {{text_decoder: {{{SLICE}}}}}", "expected: default"),
    "no form": ("llava", "modules: {text_decoder: {}}", "modules.text_decoder (line 3)", "exactly one of slices and"),
    "both forms": ("llava", f"modules: {{text_decoder: {{{SLICE}, models: [{{model: ONE}}]}}}}", "slices, models"),
    "empty": ("llava", "modules: {}", "modules (line 3): no module"),
    "key": ("llava", f"modules: {{text_decoder: {{{SLICE}, align: none}}}}", "modules.text_decoder.align (line 3)"),
    "beside slices": ("llava", f"modules: {{text_decoder: {{{SLICE}}}}}\n{SLICE}", "exactly one of slices, models"),
    "parameter": ("llava", f"modules: {{text_decoder: {{{SLICE}, parameters: {{weigth: 1}}}}}}",
                  "modules.text_decoder.parameters.weigth (line 3): passthrough has no parameter"),
    "range": ("llava", "modules: {vision_tower: {slices: [{sources: [{model: ONE, layer_range: [0, 9]}]}]}}",
              "modules.vision_tower.slices[0].sources[0].layer_range (line 3)", "beyond the 6 layers"),
    "new layers that see": ("llava", f"modules: {{vision_tower: {{{NEW}}}}}", "cannot start as the identity",
                            "the layers of a vision or audio tower are not known"),
    "no layers": ("llava", f"modules: {{multi_modal_projector: {{{SLICE}}}}}", "multi_modal_projector has no layers"),
    "another kind": ("llava", "modules: {vision_tower: {models: [{model: LLAMA}]}}", "has no module vision_tower"),
    "neither side": ("whisper", SLICE, "the model has several stacks of layers", "encoder: {slices: ...}"),
}  # fmt: skip


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("llama") / "llama", layers=3)


@pytest.mark.parametrize("case", WRONG)
def test_wrong_modules(run, models, llama, tmp_path, case):
    family, text, *fragments = WRONG[case]
    one = llama if family == "llama" else models(family)[0]
    text = text.replace("ONE", str(one)).replace("LLAMA", str(llama))
    recipe = write_recipe(tmp_path / "r.yml", f"merge_method: passthrough\nbase_model: {one}\n{text}\n")
    errors = run("merge", recipe, tmp_path / "out", expect=2).err
    for fragment in fragments:
        assert fragment in errors, errors


def test_layers_that_are_told_by_number(run, models, tmp_path):
    """Qwen2.5-VL names the vision layers that see all, llava the layer whose features it takes: the numbers follow."""
    one, _ = models("qwen2_vl")
    config = json.loads((one / "config.json").read_text())
    config["vision_config"]["fullatt_block_indexes"] = [1, 4]
    numbered = tmp_path / "numbered"
    numbered.mkdir()
    (numbered / "model.safetensors").symlink_to(one / "model.safetensors")
    (numbered / "config.json").write_text(json.dumps(config))
    text = "merge_method: passthrough\nmodules:\n  vision_tower:\n"
    text += "    slices: [{sources: [{model: %s, layer_range: %s}]}]\n"
    for layers, numbers in (([0, 6], [1, 4]), ([0, 5], [1, 4]), ([1, 6], [0, 3]), ([2, 4], [])):
        recipe = write_recipe(tmp_path / "r.yml", text % (numbered, layers))
        planned = run("plan", recipe, "--json").json()
        assert planned["modules"]["vision_tower"]["num_layers"] == layers[1] - layers[0] and planned["num_layers"] == 4
        assert api.plan(recipe).config["vision_config"]["fullatt_block_indexes"] == numbers
    one, _ = models("llava")
    recipe = write_recipe(tmp_path / "r.yml", text % (one, [1, 4]))
    assert api.plan(recipe).config["vision_feature_layer"] == 1
    write_recipe(recipe, text % (one, [2, 4]))
    assert "vision_feature_layer names a layer of the vision tower" in run("plan", recipe, expect=2).err


def test_new_layers_alone_are_another_function(run, llama, tmp_path):
    sources = f"sources: [{{model: {llama}, layer_range: [0, 2]}}, {{model: {llama}, layer_range: [1, 3]}}]"
    recipe = write_recipe(tmp_path / "r.yml", f"base_model: {llama}\nslices: [{{merge_method: ot_fuse, {sources}}}]\n")
    planned = run("plan", recipe, "--json").json()
    assert planned["new_layers"] == [0, 1] and not planned["function_preserving"]
