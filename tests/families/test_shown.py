"""What users are shown of models of many kinds: tables, warnings, and reasons."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_contract import upscaled
from tiny_models import make, shared


def test_inspect_shows_experts_in_one_row_and_every_layout(run):
    out = run("inspect", shared("qwen3_moe")).out
    rows = [line for line in out.splitlines() if "experts.*.gate " in line]
    assert len(rows) == 1 and "4 experts" in rows[0] and "experts.0." not in out and "None" not in out
    assert "layer 0, attention + experts (5 such layers)" in out and "layer 4, attention + mlp" in out
    facts = json.loads(run("inspect", shared("qwen3_moe"), "--json").out)
    assert [layout["layers"] for layout in facts["layouts"]] == [[0, 1, 2, 3, 5], [4]]
    assert facts["roles"] == facts["layouts"][0]["roles"] and len(facts["roles"]) == 8 + 1 + 4 * 3


@pytest.mark.parametrize("kind", ["qwen3_vl_text", "gpt2"])
def test_inspect_finds_sizes_under_every_key(run, kind):
    facts = json.loads(run("inspect", shared(kind), "--json").out)
    assert (facts["hidden_size"], facts["intermediate_size"], facts["heads"]) == (32, 48, 4)


@pytest.mark.parametrize("kind", ["mamba2", "granitemoehybrid"])
def test_infinities_in_a_config_do_not_keep_verify_from_building_the_base(run, tmp_path, kind):
    model = make(tmp_path / "model", kind)
    assert "__float__" in (model / "config.json").read_text()
    checks = json.loads(run("verify", upscaled(run, model, tmp_path / "out"), "--json").out)["checks"]
    assert {check["name"]: check["passed"] for check in checks}["layer kinds"] is True


def test_one_warning_for_all_layers_of_which_the_same_is_to_be_said(run, tmp_path):
    err = run("upscale", shared("gpt_oss"), tmp_path / "out", "--insert", "all", "--dry-run").err
    warnings = [line for line in err.splitlines() if "layer_types differ" in line]
    assert len(warnings) == 2 and "layers 1, 5, 9 fuse layers" in warnings[0] and "layers 3, 7 fuse" in warnings[1]


def test_experts_that_do_not_fit_together_are_refused(run, tmp_path):
    """Down reads 64 neurons where gate and up have 48: a file that its config does not describe."""
    model = make(tmp_path / "model", "gpt_oss")
    tensors = load_file(model / "model.safetensors")
    for name in [name for name in tensors if name.endswith("experts.down_proj")]:
        tensors[name] = torch.zeros(tensors[name].shape[0], 64, tensors[name].shape[2])
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    err = run("upscale", model, tmp_path / "out", expect=2).err
    assert "experts.0.down of shape [32, 64] does not fit experts.0.up of shape [48, 32]" in err
    assert not (tmp_path / "out").exists()


def test_methods_take_a_model_type(run):
    assert run("methods", "kimi_k2").out == run("methods", "deepseek_v3").out
    assert "deus-merge methods" in run("methods", "kimi_k9", expect=2).err


@pytest.mark.parametrize(("kind", "other"), [("gemma3n_text", False), ("deepseek_v4", True)])
def test_a_family_without_identity_is_told_what_else_there_is(run, tmp_path, kind, other):
    """No other preset is proposed where that is refused too."""
    err = run("upscale", shared(kind), tmp_path / "out", expect=2).err
    assert "cannot start as the identity" in err and ("average" in err) == other
    done = run("upscale", shared(kind), tmp_path / "out", "--preset", "solar", "--dry-run", expect=None)
    assert (done.code == 0) == other and ("its depth" in err) != other


def test_models_of_two_families_are_named_with_their_types(run, tmp_path):
    models = [{"model": str(shared(kind)), "parameters": {"weight": 1}} for kind in ("llama", "olmo2")]
    (tmp_path / "r.yml").write_text(json.dumps({"merge_method": "linear", "models": models}))
    err = run("merge", tmp_path / "r.yml", tmp_path / "out", expect=2).err
    assert "models do not match" in err and "is of model_type llama" in err and "is of model_type olmo2" in err
