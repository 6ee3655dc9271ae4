"""Models whose tensors have the same shapes but whose configs make them compute differently: refused, or reported."""

from __future__ import annotations

import json
import shutil

import pytest
from support import make_model

LINEAR = "merge_method: linear\nparameters: {weight: 0.5}\nmodels: [{model: a}, {model: b}]\n"
SLICES = (
    "merge_method: passthrough\nslices:\n"
    "  - sources: [{model: a, layer_range: [0, 2]}]\n  - sources: [{model: b, layer_range: [1, 2]}]\n"
)
# changed keys of one model's config, and what the warning says
REPORTED = {
    "theta": ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, "rope_theta: 1000000.0 instead of 1"),
    "theta of an old form": ({"rope_parameters": None, "rope_theta": 5e5}, "rope_theta: 500000.0 instead of 10000.0"),
    "scaled": ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
               "rope_type: linear instead of nothing, rope.factor: 2.0 instead of nothing"),
    "norm": ({"rms_norm_eps": 1e-5}, "rms_norm_eps: 1e-05 instead of 1e-06"),
    "a key of one only": ({"logits_scaling": 8.0}, "logits_scaling: 8.0 instead of nothing"),
    "a section": ({"attn_config": {"clip_qkv": 8}}, "attn_config.clip_qkv: 8 instead of nothing"),
    "switched off": ({"head_dim": None, "rms_norm_eps": 1e-5}, "rms_norm_eps: 1e-05 instead of 1e-06"),
    "two": ({"rms_norm_eps": 1e-5, "attention_multiplier": 0.5}, "attention_multiplier: 0.5 instead of nothing"),
}  # fmt: skip
REFUSED = {
    "activation": ({"hidden_act": "gelu"}, "models do not match: hidden_act", "silu, as in a", "gelu in b"),
    "heads": ({"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}, "num_attention_heads", "2 in b"),
    "rotated part": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor", "0.5 in b"),
}
EQUAL = {
    "another dtype key": {"dtype": None, "torch_dtype": "float32"},
    "default left out": {"rms_norm_eps": None, "hidden_act": None, "attention_bias": None},
    "old rope": {"rope_parameters": None, "rope_theta": 10000, "rope_scaling": None},
    "another name": {"hidden_act": "swish"},
    "of no layer": {"use_cache": False, "attention_dropout": 0.1, "initializer_range": 1.0, "eos_token_id": [2, 3],
                    "transformers_version": "4.1", "pretraining_tp": 2, "max_position_embeddings": 128},
}  # fmt: skip


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    root = tmp_path_factory.mktemp("unlike")
    make_model(root / "a", layers=2)
    shutil.copytree(root / "a", root / "b")
    return root


def change(folder, changes: dict) -> None:
    config = json.loads((folder.parent / "a/config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


@pytest.mark.parametrize("recipe", [LINEAR, SLICES], ids=["merged", "in other slices"])
def test_settings_that_differ_are_reported_with_both_values(run, pair, tmp_path, monkeypatch, recipe):
    monkeypatch.chdir(pair)
    (tmp_path / "recipe.yml").write_text(recipe)
    for changes, warning in REPORTED.values():
        change(pair / "b", changes)
        done = run("merge", tmp_path / "recipe.yml", tmp_path / "out", "--overwrite", "--no-verify")
        assert "b computes with other settings than a" in done.err and warning in done.err, done.err
    for changes in EQUAL.values():
        change(pair / "b", changes)
        assert "settings" not in run("plan", tmp_path / "recipe.yml").err


@pytest.mark.parametrize("recipe", [LINEAR, SLICES], ids=["merged", "in other slices"])
@pytest.mark.parametrize("case", REFUSED)
def test_weights_that_mean_something_else_are_refused(run, pair, tmp_path, monkeypatch, case, recipe):
    monkeypatch.chdir(pair)
    (tmp_path / "recipe.yml").write_text(recipe)
    changes, *fragments = REFUSED[case]
    change(pair / "b", changes)
    done = run("merge", tmp_path / "recipe.yml", tmp_path / "out", expect=2)
    assert all(fragment in done.err for fragment in fragments), done.err
    assert not (tmp_path / "out").exists()


def test_a_default_that_one_model_switches_off(run, tmp_path):
    """Mistral's window is 4096 where the config has no such key, and none where it is null."""
    for name, value in (("a", 4096), ("b", None)):
        make_model(tmp_path / name, "mistral", layers=1)
        file = tmp_path / name / "config.json"
        config = {k: v for k, v in json.loads(file.read_text()).items() if k != "sliding_window"}
        file.write_text(json.dumps(config | ({"sliding_window": None} if value is None else {})))
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(f"merge_method: karcher\nmodels: [{{model: {tmp_path}/a}}, {{model: {tmp_path}/b}}]\n")
    assert "sliding_window: nothing instead of 4096" in run("plan", recipe).err
