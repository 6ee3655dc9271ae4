"""config.json of the output: its depth, its lists of layers, its dtype; and when it does not fit the tensors."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import make_model, write_recipe

from deus_merge import api
from deus_merge.core.errors import ArchitectureError, PlanError
from deus_merge.models.config_rules import config_patch, typed_config

SLICES = (
    "merge_method: passthrough\nslices:\n- sources: [{model: %s, layer_range: [0, 3]}]\n"
    "- sources: [{model: %s, layer_range: [2, 4]}]\n"
)


@pytest.fixture
def base(tmp_path):
    return make_model(tmp_path / "base", layers=4)


@pytest.fixture
def planned(tmp_path):
    """The plan of a recipe, whose models may have edited configs."""
    return lambda text: api.plan(write_recipe(tmp_path / "recipe.yml", text))


def edit(base, folder, **changes):
    """A copy of a model with other entries in its config.json; None removes one."""
    shutil.copytree(base, folder)
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    return folder


def test_lists_of_layers_follow_their_layers(base, planned, tmp_path):
    lists = {"attention_window": [1, 2, 3, 4], "block_configs": [[1], [2], [3], [4]]}
    other = {"eos_token_id": [2, 3, 4, 5], "stop_tokens": [1, 2, 3, 4], "pair": [7, 8], "sizes": [9, 9, 9, 8]}
    model = edit(base, tmp_path / "model", **lists, **other)
    config = planned(SLICES % (model, model)).config
    assert config["num_hidden_layers"] == 5
    assert config["attention_window"] == [1, 2, 3, 3, 4] and config["block_configs"] == [[1], [2], [3], [3], [4]]
    assert {key: config[key] for key in other} == other  # about something else
    grown = planned(f"base_model: {model}\nupscale: {{insert: {{after: [1]}}}}\n").config
    assert grown["attention_window"] == [1, 2, 3, 3, 4]  # a new layer is of its upper neighbour's kind
    unlike = edit(base, tmp_path / "unlike")
    with pytest.raises(PlanError, match="which the donor has"):
        planned(SLICES % (model, unlike))


def test_a_merged_layer_is_of_the_base_models_kind(base, planned, tmp_path):
    one, two = (edit(base, tmp_path / str(i), attention_window=[10 * i + j for j in range(4)]) for i in (1, 2))
    text = (
        "merge_method: slerp\nbase_model: %s\nparameters: {t: 0.5}\nslices:\n- sources: "
        "[{model: %s, layer_range: [0, 3]}, {model: %s, layer_range: [1, 4]}]\n"
    )
    assert planned(text % (one, one, two)).config["attention_window"] == [10, 11, 12]
    assert planned(text % (two, one, two)).config["attention_window"] == [21, 22, 23]
    told = [w for w in planned(text % (one, one, two)).warnings if "layer 1 fuses layers whose attention_window" in w]
    assert len(told) == 1 and "22" in told[0] and told[0].endswith("it takes 11")


def test_kinds_of_layers_that_a_number_implies(planned, tmp_path):
    """From layer 2 on Qwen2's attention slides. The number stays where it can say the kinds of the output's layers."""
    model = make_model(tmp_path / "model", "qwen2", layers=4, use_sliding_window=True, max_window_layers=2)
    config = json.loads((model / "config.json").read_text())
    config.pop("layer_types", None)
    (model / "config.json").write_text(json.dumps(config))
    full, sliding = "full_attention", "sliding_attention"
    again = "merge_method: passthrough\nslices:\n- sources: [{model: %s, layer_range: [%d, %d]}]\n"
    number = planned(SLICES % (model, model)).config
    assert "layer_types" not in number and number["max_window_layers"] == 2
    number = planned(again % (model, 1, 4)).config
    assert "layer_types" not in number and number["max_window_layers"] == 1
    listed = planned(again % (model, 0, 4) + f"- sources: [{{model: {model}, layer_range: [0, 1]}}]\n").config
    assert listed["layer_types"] == [full, full, sliding, sliding, full] and "max_window_layers" not in listed


def test_layers_that_are_told_by_their_numbers(base, planned, tmp_path):
    """Their numbers follow them. Unknown keys are right as long as every layer stays in its place."""
    model = edit(base, tmp_path / "model", fullatt_block_indexes=[1, 3])
    assert planned(SLICES % (model, model)).config["fullatt_block_indexes"] == [1, 4]
    whole = "merge_method: passthrough\nmodels: [{model: %s}]\n"
    for i, value in enumerate(([1, 3], ["a", "b", "c", "d"], {"0": "a", "3": "b"})):
        model = edit(base, tmp_path / str(i), strange_key=value)
        assert planned(whole % model).config["strange_key"] == value
        with pytest.raises(PlanError, match="config.json's strange_key looks as if"):
            planned(SLICES % (model, model))


@pytest.mark.parametrize("keys", [("dtype",), ("torch_dtype",), ("dtype", "torch_dtype"), ()])
def test_the_dtype_of_the_recipe_is_the_configs(base, planned, tmp_path, keys):
    """Under the keys that the config has; else under the one that every transformers reads."""
    changes = {"dtype": None, "torch_dtype": None} | dict.fromkeys(keys, "float32")
    model = edit(base, tmp_path / "model", **changes)
    config = planned(f"merge_method: passthrough\ndtype: bfloat16\nmodels: [{{model: {model}}}]\n").config
    got = {key: config[key] for key in ("dtype", "torch_dtype") if key in config}
    assert got == dict.fromkeys(keys or ("torch_dtype",), "bfloat16")


def test_a_wider_source_widens_the_config(base, planned, tmp_path):
    half = make_model(tmp_path / "half", layers=4, dtype=torch.bfloat16)
    text = "merge_method: linear\nbase_model: %s\nparameters: {weight: 1}\nmodels: [{model: %s}, {model: %s}]\n"
    assert planned(text % (half, half, base)).config["dtype"] == "float32"
    assert planned(text % (half, half, half)).config["dtype"] == "bfloat16"
    aligned = "align: symmetry\n" + (text % (half, half, base)).replace("{weight: 1}\n", "{weight: [{value: 1}]}\n")
    assert planned(aligned).config["dtype"] == "float32"


def test_copies_of_two_dtypes_are_reported_and_held_by_the_config(base, planned, tmp_path):
    """A float32 layer between bfloat16 ones. A float32 norm that the donor has itself is as usual."""
    half = make_model(tmp_path / "half", layers=4, dtype=torch.bfloat16)
    copied = "merge_method: passthrough\nslices:\n" + "".join(
        f"  - sources: [{{model: {model}, layer_range: [{i}, {i + 1}]}}]\n" for i, model in enumerate((half, base))
    )
    mixed = planned(copied)
    wanted = "9 copied tensors are in another dtype than those of"
    assert any(wanted in w and "is float32, not bfloat16; config.json says float32" in w for w in mixed.warnings)
    assert mixed.config["dtype"] == "float32"
    assert not any(wanted in w for w in planned(copied + "dtype: bfloat16\n").warnings)

    tensors = load_file(half / "model.safetensors")
    tensors |= {name: tensor.float() for name, tensor in tensors.items() if "norm" in name}
    save_file(tensors, half / "model.safetensors", {"format": "pt"})
    merged = f"merge_method: karcher\nmodels: [{{model: {half}}}, {{model: {half}}}]\n"
    for text in (copied.replace(f" {base},", f" {half},"), merged):
        usual = planned(text)
        assert usual.config["dtype"] == "bfloat16" and not any("dtype" in w for w in usual.warnings)


def test_parts_of_a_config_have_its_dtype_too():
    config = {"dtype": "bfloat16", "text_config": {"torch_dtype": "bfloat16"}, "vision_config": {}}
    typed = typed_config(config, "F16")
    assert typed == {"dtype": "float16", "text_config": {"torch_dtype": "float16"}, "vision_config": {}}


@pytest.mark.parametrize(
    "changes",
    [
        {"vocab_size": 64}, {"hidden_size": 64}, {"intermediate_size": 96}, {"num_key_value_heads": 1},
        {"num_attention_heads": 8}, {"head_dim": 4}, {"num_key_value_heads": None},
        {"layer_types": ["full_attention"] * 3}, {"num_hidden_layers": 3},
    ],
)  # fmt: skip
def test_a_config_that_does_not_fit_is_refused(base, planned, tmp_path, changes):
    model = edit(base, tmp_path / "model", **changes)
    with pytest.raises(ArchitectureError, match="config.json|layer"):
        planned(f"merge_method: passthrough\nmodels: [{{model: {model}}}]\n")


def test_a_head_size_of_its_own(planned, tmp_path):
    """Heads need not be hidden_size / num_attention_heads wide, and o reads as many columns as there are queries."""
    model = make_model(tmp_path / "model", "qwen3", layers=2, head_dim=12)
    plan = planned(f"base_model: {model}\nupscale: {{insert: all}}\n")
    assert plan.num_layers == 3 and plan.blocks[2].outputs[0].heads.size == 12


def test_models_with_other_heads_do_not_match(base, planned, tmp_path):
    """The shapes are the same, and the result would compute something else."""
    model = edit(base, tmp_path / "model", num_attention_heads=8, num_key_value_heads=4, head_dim=4)
    text = "merge_method: linear\nparameters: {weight: 1}\nmodels: [{model: %s}, {model: %s}]\n"
    with pytest.raises(PlanError, match="models do not match: num_attention_heads"):
        planned(text % (base, model))
    spelled = edit(make_model(tmp_path / "all", layers=4, num_key_value_heads=4), tmp_path / "spelled")
    implied = edit(spelled, tmp_path / "implied", num_key_value_heads=None)  # as many as queries
    assert planned(text % (spelled, implied)).num_layers == 4


def test_a_patch_turns_one_config_into_the_other():
    """A JSON merge patch (RFC 7386)."""

    def patched(config, patch):
        result = dict(config)
        for key, value in patch.items():
            if value is None:
                result.pop(key, None)
            elif isinstance(value, dict):
                result[key] = patched(result.get(key) if isinstance(result.get(key), dict) else {}, value)
            else:
                result[key] = value
        return result

    one = {"a": 1, "b": {"c": 2, "d": [1]}, "e": 3, "f": {"g": 1}}
    two = {"a": 1, "b": {"c": 2, "d": [1, 2]}, "f": 4, "h": {"i": 5}}
    assert patched(one, config_patch(one, two)) == two and patched(two, config_patch(two, one)) == one
    assert config_patch(one, one) == {}
    assert "a" not in config_patch(one, two) and "c" not in config_patch(one, two)["b"]
