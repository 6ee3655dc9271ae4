"""What configs say of each layer, compared with the layers that transformers builds from them."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from layer_oracle import SIZES, build, in_order, layers_of, lively, loaded, logits, saved_config
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from deus_merge.core.errors import PlanError
from deus_merge.models.facts.base import Pinned, Rule, Scope, Unsayable, changed
from deus_merge.models.facts.forms import Count, Every, Listed, Period
from deus_merge.models.facts.numbers import Marks, Numbers, Parts
from deus_merge.models.facts.special import ByNumber, Cycle, Groups, Letters, Span, SparseStep
from deus_merge.models.facts.ties import Shared
from deus_merge.models.layer_facts import contract, expand, layer_kinds

FULL, SLIDING, LINEAR = "full_attention", "sliding_attention", "linear_attention"
MIXED = [FULL, SLIDING, SLIDING, FULL, FULL, SLIDING, FULL, SLIDING]

#: model_type, settings of the tiny model, changes that make the saved config the published one (null: a key less)
CASES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("llama", {}, {}),
    ("mistral", {}, {}),
    ("qwen2", {"use_sliding_window": True, "max_window_layers": 3}, {"layer_types": None}),
    ("qwen3", {"use_sliding_window": True, "max_window_layers": 3}, {"layer_types": None}),
    ("qwen2_moe", {"use_sliding_window": True, "max_window_layers": 5, "mlp_only_layers": [2]}, {"layer_types": None}),
    ("qwen3_moe", {"mlp_only_layers": [4]}, {}),
    ("qwen3_moe", {"decoder_sparse_step": 2, "mlp_only_layers": [3]}, {}),
    ("qwen3_next", {}, {"layer_types": None, "full_attention_interval": 4}),
    ("qwen3_5_text", {}, {"layer_types": None}),
    ("qwen3_5_moe_text", {}, {"layer_types": None, "full_attention_interval": 3}),
    ("gemma2", {}, {"layer_types": None}),
    ("gemma3_text", {}, {"layer_types": None, "_sliding_window_pattern": None, "sliding_window_pattern": 3}),
    ("gemma3_text", {"layer_types": MIXED}, {}),
    ("gemma4_text", {"hidden_size_per_layer_input": 0}, {"layer_types": None, "per_layer_config": None}),
    ("vaultgemma", {}, {"layer_types": None}),
    ("cohere2", {}, {"layer_types": None, "sliding_window_pattern": 4, "layer_switch": 4}),
    ("exaone4", {}, {"sliding_window_pattern": "LLLG"}),
    ("olmo3", {}, {"layer_types": None}),
    ("gpt_oss", {}, {"layer_types": None}),
    ("afmoe", {}, {"layer_types": None, "global_attn_every_n_layers": 4}),
    ("smollm3", {}, {"layer_types": None, "no_rope_layers": None, "no_rope_layer_interval": 4}),
    ("llama4_text", {"interleave_moe_layer_step": 2}, {"layer_types": None, "no_rope_layers": [], "moe_layers": None}),
    ("llama4_text", {"moe_layers": [1, 2, 6]}, {}),
    ("deepseek_v2", {"first_k_dense_replace": 1}, {"moe_layer_freq": 1}),
    ("deepseek_v3", {"first_k_dense_replace": 2}, {"moe_layer_freq": 1}),
    ("deepseek_v32", {}, {"layer_types": None, "mlp_layer_types": None}),
    ("glm4_moe", {}, {}),
    ("glm4_moe_lite", {}, {"mlp_layer_types": None}),
    ("glm_moe_dsa", {"index_topk_freq": 3}, {"indexer_types": None, "index_topk_pattern": "FFFSSFSS"}),
    ("ernie4_5_moe", {"moe_layer_start_index": 2}, {"moe_layer_end_index": -1}),
    ("hy_v3", {}, {"mlp_layer_types": None}),
    ("laguna", {}, {"mlp_layer_types": None}),
    ("mimo_v2_flash", {}, {"layer_types": None, "mlp_layer_types": None}),
    ("jamba", {"attn_layer_period": 4, "attn_layer_offset": 2}, {}),
    ("bamba", {"attn_layer_indices": [1, 5]}, {}),
    ("granitemoehybrid", {"layer_types": [LINEAR, FULL] * 4},
     {"layer_types": None, "layers_block_type": ["mamba", "attention"] * 4}),
    ("nemotron_h", {"layers_block_type": [LINEAR, "moe", FULL, "mlp"] * 2, "n_groups": 2},
     {"layers_block_type": None, "hybrid_override_pattern": "ME*-ME*-", "num_hidden_layers": 8}),
    ("recurrent_gemma", {}, {}),
    ("lfm2", {"full_attn_idxs": [2, 5]}, {"layer_types": None}),
    ("kimi_linear", {}, {"layer_types": None, "mlp_layer_types": None, "linear_attn_config": {
        "full_attn_layers": [4, 8], "kda_layers": [1, 2, 3, 5, 6, 7]}}),
    ("gpt_neo", {"attention_types": [[["global", "local"], 4]]}, {"attention_layers": None}),
    ("deepseek_v4", {}, {"layer_types": None, "mlp_layer_types": None, "num_hash_layers": 2,
                         "compress_ratios": [128, 128, 4, 128, 4, 128, 4, 128, 0]}),
    ("minicpm3", {}, {}),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, {}),
    ("diffllama", {}, {}),
    ("rwkv", {}, {}),
    ("zamba2", {"layers_block_type": ["mamba", "hybrid"] * 4}, {}),
    ("gemma3n_text", {"num_kv_shared_layers": 0, "hidden_size_per_layer_input": 8}, {"layer_types": None}),
]  # fmt: skip
SLICES = {
    "[0,3)+[1,n)": [0, 1, 2, *range(1, 8)],
    "[0,2)+[0,n)": [0, 1, *range(8)],
    "[1,n)": [*range(1, 8)],
    "twice": [0, 1, 2, 3, 3, 4, 5, 6, 7],
}
#: what has to be refused, and by which key; all others must work
REFUSED = {
    ("afmoe", "[0,2)+[0,n)"): "num_dense_layers",
    ("deepseek_v2", "[0,2)+[0,n)"): "first_k_dense_replace",
    ("deepseek_v3", "[0,3)+[1,n)"): "first_k_dense_replace",
    ("glm4_moe", "[0,2)+[0,n)"): "first_k_dense_replace",
    ("ernie4_5_moe", "[0,3)+[1,n)"): "moe_layer_start_index",
    **{("jamba", slices): "layer_period" for slices in ("[0,3)+[1,n)", "[0,2)+[0,n)", "twice")},
    **{("gpt2", slices): "scale_attn_by_inverse_layer_idx" for slices in SLICES},
    **{("diffllama", slices): "model_type" for slices in SLICES},
    **{("zamba2", slices): "layers_block_type" for slices in SLICES},
    **{("gemma3n_text", slices): "hidden_size_per_layer_input" for slices in SLICES},
    ("rwkv", "[0,2)+[0,n)"): "model_type",
    ("rwkv", "[1,n)"): "model_type",
}
#: those that are tested every time; the others with the slow tests
FAST = {
    "qwen2", "qwen2_moe", "qwen3_moe", "gemma3_text", "gemma4_text", "cohere2", "llama4_text", "deepseek_v3", "jamba",
    "nemotron_h", "kimi_linear", "gpt2", "rwkv", "minicpm3", "glm_moe_dsa",
}  # fmt: skip
KEYS = ("layer_types", "layers_block_type", "mlp_layer_types", "no_rope_layers", "attention_layers")


def published(config: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    merged = config | changes
    return {key: value for key, value in merged.items() if value is not None}


def depth_path(config: dict[str, Any]) -> tuple[str]:
    return (next(key for key in ("num_hidden_layers", "n_layer", "num_layers") if key in config),)


@pytest.mark.parametrize(
    ("kind", "made", "changes"),
    [
        pytest.param(*case, id=f"{i}-{case[0]}", marks=() if case[0] in FAST else pytest.mark.slow)
        for i, case in enumerate(CASES)
    ],
)
def test_every_form_says_the_layers_that_transformers_builds(kind, made, changes):
    """Saved and published; moved layers are what they were, or the error names the key."""
    saved = saved_config(kind, **made)
    if "num_hidden_layers" not in saved and "n_layer" not in saved and "num_layers" not in saved:
        saved["num_hidden_layers"] = 8
    for config in [saved, published(saved, changes)] if changes else [saved]:
        path = depth_path(config)
        facts = expand(config, path, kind)
        understood = loaded(config)
        for key in (key for key in KEYS if facts and key in facts[0] and hasattr(understood, key)):
            if any(isinstance(layer[key], Pinned) for layer in facts):
                continue
            words = {"attention": FULL, "mamba": LINEAR}
            assert [words.get(f[key], f[key]) for f in facts] == list(getattr(understood, key)), key
        assert contract(config, path, kind, facts, "here") == config
        layers = layers_of(config)
        for slices, order in SLICES.items():
            if key := REFUSED.get((kind, slices)):
                with pytest.raises(PlanError, match=key):
                    contract(config, path, kind, [facts[i] for i in order], "here")
                continue
            before = copy.deepcopy(config)
            new = contract(config, path, kind, [facts[i] for i in order], "here")
            assert config == before
            found = layers_of(new)
            assert len(found) == len(order)
            for place, origin in enumerate(order):
                assert found[place] == layers[origin], (slices, place, origin)


# through the command line --------------------------------------------------------------------------------------------


def save(folder: Path, config: dict[str, Any], changes: dict[str, Any]):
    """A lively model of a config, its config.json as it is published."""
    model = lively(build(loaded(published(config, changes)), "cpu"))
    model.save_pretrained(folder)
    written = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(published(written, changes)))
    return model


def recipe(folder: Path, model: Path, ranges: list[tuple[int, int]]) -> Path:
    slices = [{"sources": [{"model": str(model), "layer_range": list(r)}]} for r in ranges]
    path = folder / "recipe.yml"
    path.write_text(yaml.safe_dump({"merge_method": "passthrough", "slices": slices}))
    return path


@pytest.mark.parametrize(
    ("kind", "made", "changes", "ranges"),
    [
        ("gemma2", {}, {"layer_types": None}, [(0, 3), (2, 8)]),
        ("gemma3_text", {}, {"layer_types": None, "sliding_window_pattern": 3}, [(0, 2), (0, 8)]),
        ("gemma4_text", {"hidden_size_per_layer_input": 0}, {}, [(0, 4), (2, 8)]),
        ("cohere2", {}, {"layer_types": None, "sliding_window_pattern": 4}, [(1, 8)]),
        ("qwen3_moe", {"mlp_only_layers": [4]}, {}, [(0, 3), (2, 8)]),
        ("qwen3_next", {}, {"layer_types": None, "full_attention_interval": 4}, [(0, 3), (1, 8)]),
        ("llama4_text", {"interleave_moe_layer_step": 2}, {}, [(0, 3), (2, 8)]),
        ("deepseek_v3", {"first_k_dense_replace": 2, "num_mtp_layers": 0}, {}, [(1, 8)]),
        ("nemotron_h", {"layers_block_type": [LINEAR, "moe", FULL, "mlp"] * 2, "n_groups": 2},
         {"layers_block_type": None, "hybrid_override_pattern": "ME*-ME*-", "num_hidden_layers": 8}, [(0, 3), (1, 8)]),
    ],
)  # fmt: skip
def test_moved_layers_compute_what_they_did(run, tmp_path, kind, made, changes, ranges):
    """Logits equal those of the base's own layers in that order; mixed-up kinds change them by 0.01 or more."""
    base = save(tmp_path / "base", saved_config(kind, **made), changes)
    run("merge", recipe(tmp_path, tmp_path / "base", ranges), tmp_path / "out")
    order = [i for first, last in ranges for i in range(first, last)]
    found, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", attn_implementation="eager", output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    torch.testing.assert_close(logits(found.float().eval()), logits(in_order(base, order)), rtol=0, atol=2e-6)
    run("verify", tmp_path / "out", "--quick")


@pytest.mark.parametrize(
    ("kind", "made", "ranges", "key"),
    [
        ("deepseek_v3", {"first_k_dense_replace": 2, "num_mtp_layers": 0}, [(0, 3), (1, 8)], "first_k_dense_replace"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, [(1, 8)], "scale_attn_by_inverse_layer_idx"),
        ("diffllama", {}, [(0, 3), (2, 8)], "model_type"),
    ],
)
def test_what_the_config_cannot_say_is_refused(run, tmp_path, kind, made, ranges, key):
    """By the key's name, before anything is written; as long as every layer stays in its place nothing is."""
    save(tmp_path / "base", saved_config(kind, **made), {})
    error = run("merge", recipe(tmp_path, tmp_path / "base", ranges), tmp_path / "out", expect=2).err
    assert f"config.json's {key} " in error and not (tmp_path / "out").exists()
    run("merge", recipe(tmp_path, tmp_path / "base", [(0, 8)]), tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text()) == json.loads(
        (tmp_path / "base/config.json").read_text()
    )


def test_a_depth_in_two_places(run, tmp_path):
    """Qwen2.5-VL, with its depth at the top and in ``text_config``."""
    text = {k: SIZES[k] for k in ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads",
                                  "num_key_value_heads")}  # fmt: skip
    text |= {"num_hidden_layers": 4, "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]}}
    text |= {"use_sliding_window": True, "max_window_layers": 2, "sliding_window": 4, "pad_token_id": 0}
    vision = {"depth": 2, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": 32}
    vision |= {"fullatt_block_indexes": [1]}
    cls = CONFIG_MAPPING["qwen2_5_vl"]
    tokens = dict.fromkeys(("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"), 1)
    base = lively(AutoModelForImageTextToText.from_config(
        cls(text_config=text, vision_config=vision, **tokens), attn_implementation="eager"
    ).float().eval())  # fmt: skip
    base.save_pretrained(tmp_path / "base")
    written = json.loads((tmp_path / "base/config.json").read_text())
    (tmp_path / "base/config.json").write_text(json.dumps({**written, "num_hidden_layers": 4}))
    ranges = [(0, 3), (1, 4)]
    path = tmp_path / "recipe.yml"
    slices = [{"sources": [{"model": str(tmp_path / "base"), "layer_range": list(r)}]} for r in ranges]
    path.write_text(yaml.safe_dump({"merge_method": "passthrough", "modules": {"text_decoder": {"slices": slices}}}))
    run("merge", path, tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["num_hidden_layers"] == config["text_config"]["num_hidden_layers"] == 6
    assert config["text_config"]["layer_types"] == [FULL, FULL, SLIDING, FULL, SLIDING, SLIDING]
    found = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", attn_implementation="eager").float().eval()
    assert len(found.model.language_model.layers) == 6
    wanted = copy.deepcopy(base)
    layers = base.model.language_model.layers
    wanted.model.language_model.layers = torch.nn.ModuleList(copy.deepcopy(layers[i]) for i in (0, 1, 2, 1, 2, 3))
    for settings_ in (wanted.config.text_config, wanted.model.language_model.config):
        settings_.num_hidden_layers, settings_.layer_types = 6, config["text_config"]["layer_types"]
    torch.testing.assert_close(logits(found), logits(wanted), rtol=0, atol=2e-6)


def test_inspect_and_verify_say_the_kinds_of_layers(run, tmp_path):
    save(tmp_path / "base", saved_config("gemma2"), {"layer_types": None})
    told = run("inspect", tmp_path / "base", "--json").json()
    assert told["layer_kinds"] == [SLIDING, FULL] * 4
    run("merge", recipe(tmp_path, tmp_path / "base", [(0, 3), (2, 8)]), tmp_path / "out")
    text = run("inspect", tmp_path / "out").out
    assert "2–3" in text and SLIDING in text
    path = tmp_path / "out/config.json"
    config = json.loads(path.read_text())
    assert config["layer_types"] == [SLIDING, FULL, SLIDING, SLIDING, FULL, SLIDING, FULL, SLIDING, FULL]
    config["layer_types"][4] = SLIDING
    path.write_text(json.dumps(config))
    error = run("verify", tmp_path / "out", "--quick", expect=3)
    assert "layer_types of layer 4" in error.out + error.err


# other places --------------------------------------------------------------------------------------------------------

PLAIN = {"model_type": "llama", "num_hidden_layers": 4}


def moved(config: dict[str, Any], order: list[int], path: tuple[str, ...] = ("num_hidden_layers",)) -> dict[str, Any]:
    facts = expand(config, path, config["model_type"])
    return contract(config, path, config["model_type"], [facts[i] for i in order], "here")


def test_layer_numbers_in_quantization_config():
    skipped = ["lm_head", "model.layers.0.mlp.gate", "model.layers.3.self_attn", "model.vision.blocks.1.mlp"]
    config = PLAIN | {"quantization_config": {
        "bits": 4, "modules_to_not_convert": skipped,
        "layers": {"model.layers.3.mlp": {"bits": 8}}, "ignore": [r"re:.*layers\.3\.mlp"],
    }}  # fmt: skip
    new = moved(config, [0, 1, 0, 3, 3])["quantization_config"]
    assert new["modules_to_not_convert"] == [
        "lm_head", "model.layers.0.mlp.gate", "model.layers.2.mlp.gate", "model.layers.3.self_attn",
        "model.layers.4.self_attn", "model.vision.blocks.1.mlp",
    ]  # fmt: skip
    assert new["layers"] == {"model.layers.3.mlp": {"bits": 8}, "model.layers.4.mlp": {"bits": 8}}
    assert new["ignore"] == [r"re:.*layers\.3\.mlp", r"re:.*layers\.4\.mlp"] and new["bits"] == 4
    nested = {"model_type": "llava", "text_config": {**PLAIN, "quantization_config": {"ignore": skipped}}}
    new = moved(nested, [0, 1, 0, 3, 3], ("text_config", "num_hidden_layers"))["text_config"]
    assert new["num_hidden_layers"] == 5
    assert new["quantization_config"]["ignore"][2:4] == ["model.layers.2.mlp.gate", "model.layers.3.self_attn"]
    for unclear in ("re:.*layers.[0-2].mlp", "model.layers.1.*", "re:.*layers.(0|1)"):
        config = PLAIN | {"quantization_config": {"ignore": [unclear]}}
        assert moved(config, [0, 1, 2, 3]) == config
        with pytest.raises(PlanError, match="quantization_config names layers"):
            moved(config, [0, 2, 1, 3])


@pytest.mark.parametrize("change", [{"use_cla": True, "cla_share_factor": 2}, {"num_kv_shared_layers": 2}])
def test_layers_that_use_keys_of_others_stay_where_they_are(change):
    """Also in models whose code comes with them, of which nothing but the config is known."""
    config = PLAIN | {"model_type": "hunyuan"} | change
    assert moved(config, [0, 1, 2, 3]) == config
    with pytest.raises(PlanError, match=next(iter(change))):
        moved(config, [0, 1, 1, 2, 3])


def test_features_of_a_vision_tower():
    path = ("vision_config", "num_hidden_layers")
    for value, order, wanted in (
        (-2, [0, 1, 2, 2, 3], -2), (-2, [0, 1, 2, 3, 3], -3), (2, [0, 1, 1, 2, 3], 3),
        ([1, -1], [0, 0, 1, 2, 3], [2, -1]),
    ):  # fmt: skip
        config = {"model_type": "llava", "vision_config": {"num_hidden_layers": 4}, "vision_feature_layer": value}
        assert moved(config, order, path)["vision_feature_layer"] == wanted
    with pytest.raises(PlanError, match="vision_feature_layer names a layer"):
        moved(config, [0, 1, 2], path)


def test_words_for_kinds():
    config = PLAIN | {"layer_types": [FULL, SLIDING, FULL, FULL], "ffn_multipliers": [1, 1, 2, 1]}
    assert layer_kinds(expand(config, ("num_hidden_layers",), "llama"))[2] == f"{FULL}, ffn_multipliers 2"
    assert layer_kinds(expand(PLAIN, ("num_hidden_layers",), "llama")) == [""] * 4


# the laws of forms ---------------------------------------------------------------------------------------------------

KINDS = st.lists(st.sampled_from("ab"), min_size=1, max_size=12)
#: forms, and values that they may be asked to say
FORMS = [
    (Listed("k"), KINDS), (Listed("k", {0: "a", 1: "b"}, tail=True), KINDS), (Numbers("k", "a", "b"), KINDS),
    (Numbers("k", "a", "b", first=1), KINDS), (Parts({"a": ("n", "x"), "b": ("n", "y")}, first=1), KINDS),
    (Every("k", "a", "b", 4), KINDS), (Every("k", "a", "b", 3, shift=-1), KINDS),
    (Period("p", "o", "a", "b", (4, 1)), KINDS),
    (Count("k", "a", "b", 1), KINDS), (Count("k", "a", "b", 1, every="e"), KINDS),
    (SparseStep(), KINDS.map(lambda v: ["sparse" if x == "a" else "dense" for x in v])),
    (Span(inside="a", outside="b"), KINDS), (Letters("k", {"A": "a", "B": "b"}), KINDS),
    (Cycle("k", ("a", "b")), KINDS), (Groups("k"), KINDS),
    (ByNumber("k"), st.lists(st.sampled_from([{}, {"head_dim": 4}]), min_size=1, max_size=12)),
]  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(draw=st.data())
def test_a_form_says_what_it_was_made_to_say(draw):
    """Whatever it says before; or it says that it cannot. Said again, nothing changes."""
    form, values = draw.draw(st.sampled_from(FORMS))
    old, new = draw.draw(values), draw.draw(values)
    section: dict[str, Any] = {"n": {}}
    for wanted in (old, new):
        scope = Scope(section, section, len(old))
        try:
            section = changed(section, form.write(scope, wanted))
        except Unsayable:
            assert not form.explicit
            return
        scope = Scope(section, section, len(wanted))
        assert list(form.read(scope) or []) == wanted
        assert changed(section, form.write(scope, wanted)) == section
        old = wanted


@settings(max_examples=100, deadline=None)
@given(values=KINDS, later=KINDS)
def test_a_rule_has_one_source(values, later):
    """The number stays where it can say the kinds; else the list takes its place, and the number goes."""
    rule = Rule("kinds", (Listed("kinds"), Every("number", "a", "b", 4)))
    section: dict[str, Any] = {"number": 2}
    first = Scope(section, section, len(values))
    assert rule.expand(first) == ["a" if i % 2 else "b" for i in range(len(values))]
    section = changed(section, rule.contract(first, later))
    assert rule.expand(Scope(section, section, len(later))) == later
    assert len(section) == 1


def test_layers_that_use_a_result_keep_it():
    form = Shared(Listed("k"))
    section = {"k": ["full", "shared", "full", "full", "shared"]}
    values = form.read(Scope(section, section, 5))
    assert values is not None
    for order, right in (([0, 1, 1, 2, 3, 4], True), ([2, 3, 4], True), ([0, 2, 1, 3, 4], False), ([1, 2], False)):
        try:
            form.write(Scope(section, section, 5), [values[i] for i in order])
        except Unsayable:
            assert not right, order
        else:
            assert right, order
    marks = {"k": [1, 2]}
    assert Marks("k", first=1).read(Scope(marks, marks, 3)) == [0, 1, None]
