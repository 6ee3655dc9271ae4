"""The examples in recipes/training, and growing on from what they trained."""

from __future__ import annotations

import json
import os
import runpy
from pathlib import Path

import pytest
import transformers
from grown import changed, grow
from support import load, weights

from deus_merge import training

RECIPES = Path(__file__).parents[2] / "recipes" / "training"


def texts(folder: Path) -> tuple[Path, Path]:
    """Python's own words, as text and as conversations."""
    import argparse
    import inspect
    import pathlib

    text, talks = folder / "text.txt", folder / "talks.jsonl"
    text.write_text(inspect.getsource(argparse)[:50_000])
    pairs = [
        (f"What does {module.__name__}.{name} do?", doc[:200])
        for module in (argparse, pathlib.Path)
        for name, member in vars(module).items()
        if callable(member) and (doc := inspect.getdoc(member))
    ]
    lines = [{"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]} for q, a in pairs]
    talks.write_text("\n".join(map(json.dumps, lines)))
    return text, talks


@pytest.fixture
def script(monkeypatch):
    """Run a script of recipes/training in this process."""
    pytest.importorskip("datasets")
    monkeypatch.syspath_prepend(str(RECIPES))

    def call(name: str, *arguments: object) -> dict:
        return runpy.run_path(str(RECIPES / f"{name}.py"))["main"]([*map(str, arguments)])

    return call


def check_example(run, script, name: str, base: Path, tmp_path: Path, *options: object) -> Path:
    """It learns, in the new layers alone; the result loads, and the base comes out of it, byte for byte."""
    out = grow(base, tmp_path / "deeper", "copy_next", {"count": 2, "where": "top"})
    source = texts(tmp_path)[name == "sft"]
    trained = tmp_path / "trained"
    losses = script(name, out, source, "--out", trained, *options)
    assert losses["after"] < losses["before"] - 0.005
    new = set(training.new_parameters(trained))
    assert changed(weights(out), weights(trained)) == new  # the frozen ones have their bytes
    assert all(weights(trained)[n].any() for n in new)
    assert load(trained).config.num_hidden_layers == load(out).config.num_hidden_layers
    assert run("verify", trained, "--json").json()["passed"]
    reported = run("strip", trained, tmp_path / "back", "--json").json()
    assert reported["different"] == [] and reported["equal_to_base"] == len(weights(base))
    assert (tmp_path / "back/model.safetensors").read_bytes() == (base / "model.safetensors").read_bytes()
    return trained


def test_continual_pre_training_and_growing_on(run, script, tiny, tmp_path):
    options = ("--steps", 12, "--length", 96, "--lr", 5e-3, "--output-ratio", 2)
    trained = check_example(run, script, "pretrain", tiny, tmp_path, *options)  # new: 4 and 6
    again = grow(trained, tmp_path / "again", insert={"after": [0, 4]})  # 8 layers become 10, new: 1 and 6
    record = json.loads((again / "deus_merge.json").read_text())
    first, second = record["lineage"]
    assert (first["new_layers"], first["trained"]) == ([5, 8], True)
    assert (second["new_layers"], second["trained"]) == ([1, 6], False)
    assert first["plan_hash"] == json.loads((trained / "deus_merge.json").read_text())["plan_hash"]
    assert second["plan_hash"] == record["plan_hash"] and second["recipe"] == record["files"]["deus_merge.yml"]
    assert training.new_parameters(again) == tuple(record["new_parameters"])
    older = training.new_parameters(again, generation=0)
    assert {name.split(".")[2] for name in older} == {"5", "8"} and len(older) == 18
    assert run("inspect", again, "--json").json()["grown"] == "5, 8 (trained); then 1, 6"
    model = load(again)
    assert training.freeze_base(model, again, generation=0).layers == (5, 8)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == set(older)
    assert "layers 5, 8, then trained, by plan" in (again / "README.md").read_text()
    reported = run("strip", again, tmp_path / "once").err
    assert not changed(weights(trained), weights(tmp_path / "once")) and "can be stripped again" in reported
    assert run("verify", tmp_path / "once", "--json").json()["passed"]
    reported = run("strip", tmp_path / "once", tmp_path / "twice", "--json").json()
    assert (reported["equal_to_base"], reported["manifest"]) == (len(weights(tiny)), None)
    trained.rename(tmp_path / "moved")
    assert "name one with --manifest" in run("strip", again, tmp_path / "alone").err
    assert (tmp_path / "twice/model.safetensors").read_bytes() == (tiny / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_supervised_fine_tuning(run, script, tiny, tmp_path):
    pytest.importorskip("trl")
    options = ("--steps", 12, "--length", 96, "--lr", 1e-2, "--optimizer", "muon")
    trained = check_example(run, script, "sft", tiny, tmp_path, *options)
    assert "assistant:" in transformers.AutoTokenizer.from_pretrained(trained).chat_template


@pytest.mark.slow
def test_continual_pre_training_of_smollm2(run, script, real, tmp_path):
    options = ("--steps", 4, "--batch", 1, "--length", 64, "--lr", 1e-3, "--eval-size", 8)
    check_example(run, script, "pretrain", real, tmp_path, *options)


def test_an_unreadable_past_is_told_and_does_no_harm(run, deeper, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for file in deeper.iterdir():
        os.link(file, source / file.name)
    record = json.loads((deeper / "deus_merge.json").read_text()) | {"format": 1}
    for name, content in {
        "another depth": record | {"num_layers": 5},
        "another format": record | {"format": 99},
        "no layers": {k: v for k, v in record.items() if k != "new_layers"},
        "odd lineage": record | {"lineage": [[], []]},
    }.items():
        (source / "deus_merge.json").unlink()
        (source / "deus_merge.json").write_text(json.dumps(content))
        out = tmp_path / name
        done = run("upscale", source, out, "--insert", "{after: [0]}", "--preset", "copy_next")
        assert "the lineage of" in done.err and "is lost" in done.err, name
        assert "lineage" not in json.loads((out / "deus_merge.json").read_text())
