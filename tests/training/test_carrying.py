"""Manifests go with the weights that they tell of; and what verify and strip then make of these."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch
from grown import grow, trainer
from safetensors.torch import save_file
from support import load, make_model, weights

from deus_merge import api, training
from deus_merge.core.errors import CheckpointError, DeusMergeError, TrainingError
from deus_merge.report.lineage import ancestors


def test_where_a_manifest_can_be_carried(deeper, tmp_path):
    base, other = deeper.parent / "base", grow(deeper.parent / "base", tmp_path / "other", insert={"after": [0, 1]})
    before = (other / "deus_merge.json").read_bytes()
    with pytest.raises(CheckpointError, match="no model to copy a manifest to"):
        training.carry_manifest(deeper, tmp_path / "mistyped")
    with pytest.raises(CheckpointError, match="not this checkpoint's"):
        training.carry_manifest(deeper, base)
    with pytest.raises(TrainingError, match="the manifest of another model"):
        training.carry_manifest(deeper, other)
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="no model"):
        training.carry_manifest(deeper, tmp_path / "file")
    assert not (tmp_path / "mistyped").exists() and not (base / "deus_merge.json").exists()
    assert (other / "deus_merge.json").read_bytes() == before


def test_refusals_to_carry_say_what_to_do(deeper, tmp_path):
    """In the wrong order; nothing at all; an adapter; pickled weights; the model of another growth."""
    saved = load(deeper)
    saved.save_pretrained(tmp_path / "saved")
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    shutil.copy(tmp_path / "saved/config.json", pickled)
    torch.save(saved.state_dict(), pickled / "pytorch_model.bin")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/adapter_config.json").write_text("{}")
    other = make_model(tmp_path / "other", layers=3)
    cases = {
        (tmp_path / "saved", deeper): "the wrong way round",
        (tmp_path / "other", tmp_path / "saved"): "the folder that deus-merge wrote",
        (tmp_path / "nowhere", tmp_path / "saved"): "the folder that deus-merge wrote",
        (deeper, tmp_path / "adapter"): "merge_and_unload",
        (deeper, pickled): "save_pretrained|safetensors",
        (deeper, other): "name the folder that this training began with",
        (deeper, tmp_path / "nowhere"): "save the trained model first",
    }
    for (source, target), hint in cases.items():
        before = sorted(target.iterdir()) if target.exists() else None
        with pytest.raises(DeusMergeError) as refused:
            training.carry_manifest(source, target)
        assert re.search(hint, str(refused.value.hint)), (hint, refused.value.hint)
        assert before == (sorted(target.iterdir()) if target.exists() else None)


def test_a_manifest_replaces_another_where_the_model_did(run, deeper, tmp_path):
    """Two trainings into one folder, and one in place: the manifest is that of the weights."""
    other = grow(deeper.parent / "base", tmp_path / "other", insert={"after": [0, 1]})
    for out in (deeper, other):
        model = load(out)
        training.freeze_base(model, out)
        made = trainer(model, tmp_path / "runs")
        training.watch(made, out)
        made.train()
    saved = tmp_path / "runs/checkpoint-4"
    assert training.new_parameters(saved) == training.new_parameters(other)
    assert (saved / "deus_merge.yml").read_bytes() == (other / "deus_merge.yml").read_bytes()
    model.save_pretrained(other, max_shard_size="60KB")  # many files now
    (other / "model.safetensors").unlink()
    training.carry_manifest(other, other)
    assert run("verify", other, "--json").json()["passed"]
    (other / "deus_merge.json").write_text("{}")
    training.carry_manifest(saved, other)  # a damaged one says nothing


def test_an_earlier_growth_is_trained_and_a_tied_head_saved_once(run, deeper, tmp_path):
    """What any growth put in may have changed; the copy of the embeddings that a base had as its head may be gone."""
    base = make_model(tmp_path / "base", tied=True)
    tensors = weights(base)
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, base / "model.safetensors")
    once = grow(base, tmp_path / "once", insert={"after": [1]})
    twice = grow(once, tmp_path / "twice", insert={"after": [0]})
    model = load(twice)
    training.freeze_base(model, twice, generation=0)
    with torch.no_grad():
        model.model.layers[3].mlp.down_proj.weight += 0.1
    model.save_pretrained(tmp_path / "trained")
    assert "lm_head.weight" in weights(twice) and "lm_head.weight" not in weights(tmp_path / "trained")
    training.carry_manifest(twice, tmp_path / "trained")
    assert run("verify", tmp_path / "trained", "--json").json()["passed"]
    reported = run("strip", tmp_path / "trained", tmp_path / "back", "--json").json()
    assert (
        reported["manifest"] is True and json.loads((tmp_path / "back/deus_merge.json").read_text())["trained"] is True
    )
    assert run("verify", tmp_path / "back", "--json").json()["passed"]


def test_training_in_another_dtype(run, tmp_path):
    """bfloat16 weights are reported; a model saved in float32 holds its base's values, and in float16 it does not."""
    out = grow(make_model(tmp_path / "base", tied=True, dtype=torch.bfloat16), tmp_path / "deeper")
    model = load(out).to(torch.bfloat16)
    assert "in bfloat16 small steps are lost" in str(training.freeze_base(model, out))
    assert "small steps" not in str(training.freeze_base(load(out), out))
    for dtype in (torch.float32, torch.float16):
        model.to(dtype).save_pretrained(tmp_path / str(dtype))
        training.carry_manifest(out, tmp_path / str(dtype))
    wide, narrow = tmp_path / "torch.float32", tmp_path / "torch.float16"
    checks = {c["name"]: c for c in run("verify", wide, "--json").json()["checks"]}
    assert "in a wider dtype" in checks["copied tensors"]["detail"]
    assert checks["tensors against the plan"]["detail"].endswith("names, shapes; now float32")
    reported = run("verify", narrow, expect=3).out
    assert "it is float16, its source bfloat16" in reported
    done = run("strip", wide, tmp_path / "back", "--json").json()
    assert (done["equal_to_base"], done["different"], done["widened"]) == (0, [], len(weights(tmp_path / "base")))
    tensors = weights(wide)
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] *= 1 + 2**-20
    save_file(tensors, wide / "model.safetensors", {"format": "pt"})
    assert "model.layers.0.mlp.up_proj.weight" in run("verify", wide, expect=3).out


def test_a_growth_that_was_trained_in_one_of_the_sources_is_trained(deeper, tmp_path):
    load(deeper).save_pretrained(tmp_path / "trained")
    training.carry_manifest(deeper, tmp_path / "trained")
    models = [f"{{model: {folder}, parameters: {{weight: 1}}}}" for folder in (deeper, tmp_path / "trained")]
    for order in (models, models[::-1]):
        (tmp_path / "r.yml").write_text(f"merge_method: linear\nmodels: [{', '.join(order)}]\n")
        (growth,), warnings = ancestors(api.plan(tmp_path / "r.yml"))
        assert growth.trained and growth.new_layers == (2, 4) and not warnings
