"""The main job through the command line: every preset on trained models, function preservation bit for bit."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from support import load, logits, make_model, token_ids, weights

from deus_merge.recipe.presets import PRESETS

PRESERVING = [name for name, preset in PRESETS.items() if preset.function_preserving]


def check_output(base, out, *, same_function: bool) -> None:
    """Copied tensors are byte-equal, the manifest is true, and the function is preserved where the plan says so."""
    record = json.loads((out / "deus_merge.json").read_text())
    ours, theirs = weights(out), weights(base)
    assert set(ours) == set(record["tensors"])
    copied = {n: o for n, o in record["tensors"].items() if o["action"] == "copy"}
    for name, origin in copied.items():
        assert ours[name].view(torch.uint8).equal(theirs[origin["tensor"]].view(torch.uint8)), name
    for name, origin in record["tensors"].items():
        if origin["action"] == "zeros":
            assert not ours[name].view(torch.uint8).any(), name
    prefixes = tuple(f"model.layers.{i}." for i in record["new_layers"])
    assert record["new_parameters"] == [n for n in record["tensors"] if n.startswith(prefixes)]
    ids = token_ids(base)
    assert record["function_preserving"] is same_function
    assert torch.equal(logits(base, ids), logits(out, ids)) is same_function


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_on_the_tiny_model(run, tiny, tmp_path, preset):
    out = tmp_path / "out"
    run("upscale", tiny, out, "--preset", preset)
    check_output(tiny, out, same_function=preset in PRESERVING)
    assert run("verify", out).code == 0


@pytest.mark.slow
@pytest.mark.parametrize("preset", PRESERVING)
def test_presets_on_smollm2(run, real, tmp_path, preset):
    out = tmp_path / "out"
    run("upscale", real, out, "--preset", preset, "--insert", "top_half")
    check_output(real, out, same_function=True)
    assert json.loads((out / "config.json").read_text())["num_hidden_layers"] == 45
    layers = json.loads((out / "deus_merge.json").read_text())["layers"]
    plans = [entry for layer in layers for entry in layer["diagnostics"] if "solver" in entry]
    assert bool(plans) is (preset in ("opt_deus", "opt_deus_paper", "opt_deus_script"))
    assert all(plan["converged"] and plan["marginal_error"] <= 1e-4 for plan in plans), plans


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["llama", "llama_bias", "mistral", "qwen2", "qwen3"])
def test_families(run, tmp_path, family, tied):
    """Biases, per-head norms and grouped heads: the deeper model loads whole and computes the same."""
    base = make_model(tmp_path / "base", family, tied=tied)
    out = tmp_path / "out"
    run("upscale", base, out, "--insert", "all")
    assert load(out).config.num_hidden_layers == 7
    ids = torch.arange(3, 40).unsqueeze(0)
    assert torch.equal(logits(base, ids), logits(out, ids))
    assert ("lm_head.weight" in weights(out)) is not tied
    assert run("verify", out, "--json").json()["passed"]


def test_layer_types_follow_their_layers(run, tmp_path):
    """Qwen3 with mixed attention: a new layer takes the type of its upper neighbour, and a mixed pair is reported."""
    kinds = ["full_attention", "sliding_attention", "full_attention", "full_attention"]
    base = make_model(tmp_path / "base", "qwen3", layer_types=kinds, use_sliding_window=True, sliding_window=8)
    out = tmp_path / "out"
    done = run("upscale", base, out, "--insert", "all")
    f, s = "full_attention", "sliding_attention"
    assert json.loads((out / "config.json").read_text())["layer_types"] == [f, s, s, f, f, f, f]
    assert "layer_types" in done.err and "layer 1 fuses" in done.err
    ids = torch.arange(3, 60).unsqueeze(0)
    assert torch.equal(logits(base, ids), logits(out, ids))


def test_implied_layer_types_are_spelled_out(run, tmp_path):
    """Qwen2 says by max_window_layers where sliding attention begins: by another depth that would move."""
    base = make_model(tmp_path / "base", "qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=2)
    config = json.loads((base / "config.json").read_text())
    config.pop("layer_types", None)
    (base / "config.json").write_text(json.dumps(config))
    out = tmp_path / "out"
    run("upscale", base, out, "--insert", "all")
    ids = torch.arange(3, 60).unsqueeze(0)
    assert torch.equal(logits(base, ids), logits(out, ids))


def test_same_recipe_same_bytes_and_sources_untouched(run, tmp_path):
    base = make_model(tmp_path / "base", dtype=torch.bfloat16, max_shard_size="20KB")
    before = {p.name: p.read_bytes() for p in base.iterdir()}
    for name in ("one", "two"):
        run("upscale", base, tmp_path / name, "--max-shard-size", "30kB")
    one, two = ({p.name: p.read_bytes() for p in (tmp_path / n).iterdir()} for n in ("one", "two"))
    assert one.keys() == two.keys()
    assert [n for n in one if one[n] != two[n]] in ([], ["deus_merge.json"])  # the manifest records seconds
    assert sum(n.startswith("model-") for n in one) > 3
    assert {p.name: p.read_bytes() for p in base.iterdir()} == before
    assert torch.equal(load(tmp_path / "one")(torch.arange(9)[None]).logits, load(base)(torch.arange(9)[None]).logits)


def test_resolved_recipe_runs_again(run, tiny, tmp_path, monkeypatch):
    """As it is where base and output lie in one tree; else with the base's folder, which it does not name."""
    base = shutil.copytree(tiny, tmp_path / "base")
    run("upscale", base, tmp_path / "one", "--insert", "{count: 2, where: even}", "-p", "reg=0.05", "-p", "t=0.25")
    run("merge", tmp_path / "one" / "deus_merge.yml", tmp_path / "two")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))  # what both share lies above it
    run("upscale", base, tmp_path / "far", "--insert", "{count: 1}")
    lost = run("merge", tmp_path / "far/deus_merge.yml", tmp_path / "again", expect=2).err
    assert "written to be shared" in lost and "--model '<private>/base=FOLDER'" in lost
    run("merge", tmp_path / "far/deus_merge.yml", tmp_path / "again", "--model", f"<private>/base={base}")
    assert (tmp_path / "far/model.safetensors").read_bytes() == (tmp_path / "again/model.safetensors").read_bytes()
    assert (tmp_path / "one/model.safetensors").read_bytes() == (tmp_path / "two/model.safetensors").read_bytes()
    assert str(tiny.parent) not in (tmp_path / "one/README.md").read_text()
    hashes = [json.loads((tmp_path / n / "deus_merge.json").read_text())["plan_hash"] for n in ("one", "two")]
    assert hashes[0] == hashes[1]


def test_several_layers_in_one_gap(run, tmp_path):
    """k layers share the gap's plans and are at t = 1/(k+1), 2/(k+1), ...: for plain averages exactly so."""
    base = make_model(tmp_path / "base")
    run("upscale", base, tmp_path / "out", "--preset", "average", "--insert", "{after: [1]}", "-p", "layers_per_gap=3",
        "-p", "t=even")  # fmt: skip
    ours, theirs = weights(tmp_path / "out"), weights(base)
    a, b = (theirs[f"model.layers.{i}.mlp.up_proj.weight"].double() for i in (1, 2))
    for j in (1, 2, 3):
        new = ours[f"model.layers.{1 + j}.mlp.up_proj.weight"].double()
        assert (new - ((1 - j / 4) * a + j / 4 * b)).abs().max() < 1e-7
    assert load(tmp_path / "out").config.num_hidden_layers == 7


def test_dtype_of_the_output(run, tmp_path):
    base = make_model(tmp_path / "base")
    done = run("upscale", base, tmp_path / "out", "--dtype", "bfloat16")
    assert {t.dtype for t in weights(tmp_path / "out").values()} == {torch.bfloat16}
    assert "loses precision" in done.err
    theirs = weights(base)
    ours = weights(tmp_path / "out")
    assert ours["model.embed_tokens.weight"].equal(theirs["model.embed_tokens.weight"].to(torch.bfloat16))
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "bfloat16"


def test_overflow_and_nan_are_errors_that_name_the_tensor(run, tmp_path):
    from safetensors.torch import save_file

    base = make_model(tmp_path / "base")
    tensors = weights(base)
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = 1e6  # finite, but not in float16
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    done = run("upscale", base, tmp_path / "out", "--dtype", "float16", expect=2)
    assert "mlp.up_proj.weight becomes NaN or infinity" in done.err and "float16" in done.err
    assert "--resume" not in done.err  # it would overflow again
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    done = run("upscale", base, tmp_path / "out2", expect=2)
    assert "up" in done.err and "finite" in done.err
    assert not (tmp_path / "out").exists()
