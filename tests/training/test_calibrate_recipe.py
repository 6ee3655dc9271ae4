"""``calibrate:`` in a recipe: one command, one unfinished folder, and the bytes of the two commands."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import transformers
from grown import grow
from prose import PROSE
from safetensors.torch import load_file, save_file
from support import make_model, save_tokenizer, train_tokenizer, weights

from deus_merge import api
from deus_merge.core.errors import PlanError
from deus_merge.core.tensors import Action
from deus_merge.models.demo import tiny_model
from deus_merge.recipe.reader import parse_recipe
from deus_merge.recipe.writer import dump_recipe
from deus_merge.report.manifest import read_manifest

QUICK = {"tokens": 640, "length": 32, "batch": 5}


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "prose.txt"
    path.write_text(PROSE)
    return path


def recipe(
    text: object = "prose.txt", base: object = None, preset: str = "opt_deus", more: str = "", **settings
) -> str:
    """Of the tiny model with new layers 1 and 4."""
    section = json.dumps({"text": str(text), **QUICK, **settings})
    return (
        f"base_model: {base or tiny_model()}\n{more}calibrate: {section}\n"
        f"upscale: {{preset: {preset}, insert: {{after: [0, 2]}}}}\n"
    )


@pytest.fixture(scope="module")
def grown(text, tmp_path_factory) -> Path:
    """The output of the recipe."""
    out = tmp_path_factory.mktemp("grown") / "out"
    api.merge(parse_recipe(recipe(text)), out, api.RunOptions(device="cpu"))
    return out


def content(folder: Path) -> dict[str, bytes]:
    """All files but the recipe as it was written; of the manifest what does not depend on the time."""
    files = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    files.pop("deus_merge.original.yml")
    files["README.md"] = files["README.md"].partition(b"## Recipe")[0]
    manifest = json.loads(files.pop("deus_merge.json"))
    manifest.pop("sha256")
    for key in ("seconds", "date"):
        manifest["options"].pop(key)
    manifest["files"].pop("deus_merge.original.yml")
    for block in manifest["blocks"]:
        block.pop("seconds")
    for layer in manifest["layers"]:
        for line in layer["diagnostics"]:
            line.pop("seconds", None)
    for layer in manifest["calibration"]["layers"]:
        layer["alpha"] = round(layer["alpha"], 10)  # of another process: linear algebra may differ in the last digit
    return {**files, "deus_merge.json": json.dumps(manifest).encode()}


def test_one_command_gives_the_tensors_of_two(run, text, grown, tmp_path, monkeypatch):
    """A relative path is one of the working directory; the recipe next to the output runs anywhere."""
    monkeypatch.chdir(text.parent)
    (tmp_path / "recipe.yml").write_text(recipe())
    done = run("merge", tmp_path / "recipe.yml", tmp_path / "one", "--device", "cpu", "--json")
    events = [json.loads(line) for line in done.err.splitlines()]
    assert [event["layer"] for event in events if event["event"] == "layer calibrated"] == [1, 4]
    result = done.json()
    assert result["function_preserving"] is False and result["calibration"]["loss_after"] < 4
    deeper = grow(tiny_model(), tmp_path / "deeper", insert={"after": [0, 2]})
    options = api.CalibrationOptions(**QUICK, device="cpu")
    two = api.calibrate(deeper, tmp_path / "two", PROSE, options)
    ours, theirs = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert ours.keys() == theirs.keys() and all(ours[name].equal(theirs[name]) for name in ours)
    manifest = read_manifest(tmp_path / "one")
    assert manifest.calibration == two.record and manifest.plan_hash == result["plan_hash"]
    assert manifest.plan_hash != read_manifest(deeper).plan_hash and not manifest.function_preserving
    was_set = {name for name, tensor in read_manifest(deeper).tensors.items() if tensor.action is Action.ZEROS}
    assert was_set == {name for layer in two.record.layers for name in layer.tensors}
    assert {manifest.tensors[name].action for name in was_set} == {Action.COMPUTE}
    card = (tmp_path / "one/README.md").read_text()
    assert "were set in closed form (kfac) from 480 tokens" in card and str(text.parent) not in card
    checks = run("verify", tmp_path / "one", "--json").json()["checks"]
    assert all(check["passed"] for check in checks)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["deeper", "one", "recipe.yml", "two"]
    monkeypatch.chdir(tmp_path)
    run("merge", "one/deus_merge.yml", "again", "--device", "cpu", "--model", tiny_model())
    assert content(tmp_path / "again") == content(tmp_path / "one") == content(grown)


def test_upscale_takes_a_file_or_a_section(run, text, grown, tmp_path):
    section = json.dumps({"text": str(text), **QUICK})
    settings = ("--insert", "{after: [0, 2]}", "--device", "cpu")
    run("upscale", tiny_model(), tmp_path / "out", *settings, "--calibrate", section)
    assert content(tmp_path / "out") == content(grown)
    planned = run(
        "upscale", tiny_model(), tmp_path / "no", *settings, "--calibrate", text, "--dry-run", "--json"
    ).json()
    assert planned["calibrate"]["tokens"] == 16_384 and planned["calibrate"]["text"] == str(text)
    assert not (tmp_path / "no").exists()


def test_the_plan_says_it(run, text, tmp_path):
    def planned(**settings) -> dict:
        (tmp_path / "recipe.yml").write_text(recipe(**{"text": text, **settings}))
        return run("plan", tmp_path / "recipe.yml", "--json").json()

    first = planned()
    assert first["function_preserving"] is False
    assert first["calibrate"]["layers"] == [1, 4] and first["calibrate"]["zeroed_tensors"] == 4
    assert first["calibrate"]["damping"] == 0.3 and len(first["calibrate"]["text_sha256"]) == 64
    shown = run("plan", tmp_path / "recipe.yml").out
    assert "sets 4 zeroed tensors of 2 new layers by kfac from up to 640 tokens of prose.txt" in shown
    assert "computes the same function" not in shown
    moved, other = tmp_path / "moved.txt", tmp_path / "other.txt"
    moved.write_text(PROSE)
    other.write_text(PROSE + " more")
    assert planned(text=moved)["plan_hash"] == first["plan_hash"]
    plain = api.plan(api.upscale_recipe(tiny_model(), insert={"after": [0, 2]})).hash
    hashes = [first["plan_hash"], plain, *(planned(**s)["plan_hash"] for s in ({"text": other}, {"damping": 1}))]
    assert len(set(hashes)) == 4
    expanded = run("plan", tmp_path / "recipe.yml", "--expand", "--private-paths").out
    assert parse_recipe(expanded).calibrate == parse_recipe(recipe(text, damping=1)).calibrate


def test_a_recipe_is_read_back(text):
    read = parse_recipe(recipe(text, method="ridge", held_out=0.5, seed=7))
    assert read.calibrate.settings == {**QUICK, "method": "ridge", "held_out": 0.5, "seed": 7, "damping": 0.3}
    again = parse_recipe(dump_recipe(read))
    assert again.calibrate == read.calibrate and dump_recipe(again) == dump_recipe(read)


# interrupted ---------------------------------------------------------------------------------------------------------

CHILD = """
import os, signal, sys
import torch
torch.set_num_threads(1)  # as in the tests themselves
from deus_merge import api
from deus_merge.checkpoint.output_folder import OutputFolder
name, at, recipe, out = sys.argv[1], int(sys.argv[2]), *sys.argv[3:]
real, calls = getattr(OutputFolder, name), []
def dying(self, *arguments):
    calls.append(name)
    if len(calls) == at:
        os.kill(os.getpid(), signal.SIGKILL)
    real(self, *arguments)
    if name == "record":
        self.flush()
setattr(OutputFolder, name, dying)
api.merge(recipe, out, api.RunOptions(device="cpu"))
"""
#: 10 blocks, and then a line for each of two layers; -> how many blocks and layers are finished then
PLACES = {"a block": ("record", 5, 4, 0), "layer 1": ("record", 11, 10, 0), "layer 4": ("record", 12, 10, 1)}
PLACES["the name"] = ("finish", 1, 10, 2)


@pytest.mark.parametrize("place", PLACES)
def test_killed_and_resumed(run, text, grown, tmp_path, place):
    """In either phase: when the tensors of a layer are written and its line is not, or before OUT has its name."""
    name, at, blocks, layers = PLACES[place]
    path, out = tmp_path / "recipe.yml", tmp_path / "out"
    path.write_text(recipe(text))
    command = [sys.executable, "-c", CHILD, name, str(at), str(path), str(out)]
    ended = subprocess.run(command, capture_output=True, timeout=300)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert not out.exists() and sorted(p.name for p in tmp_path.iterdir() if p.is_dir()) == [".out.deus-tmp"]
    error = run("merge", path, out, "--device", "cpu", expect=2).err
    assert f"{blocks + layers} finished blocks" in error and "--resume" in error
    path.write_text(recipe(text, damping=2))
    assert "other values for: calibrate" in run("merge", path, out, "--device", "cpu", "--resume", expect=2).err
    plain = "\n".join(line for line in recipe(text).splitlines() if not line.startswith("calibrate"))
    path.write_text(plain)
    assert "other values for: calibrate" in run("merge", path, out, "--device", "cpu", "--resume", expect=2).err
    path.write_text(recipe(text))
    err = run("merge", path, out, "--device", "cpu", "--resume").err
    finished = f"{blocks} block{'s' * (blocks > 1)} finished by the earlier run\n" if blocks else ""
    assert finished in err
    assert err.count("finished by the earlier run, ") == layers
    assert content(out) == content(grown)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "recipe.yml"]
    if place == "the name":
        assert "already complete" in run("merge", path, out, "--device", "cpu", "--resume").err


# refused -------------------------------------------------------------------------------------------------------------


def olmo2(folder: Path) -> Path:
    """Norms stand behind its writers."""
    config = transformers.Olmo2Config(
        vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4
    )
    transformers.Olmo2ForCausalLM(config).save_pretrained(folder)
    return save_tokenizer(folder, train_tokenizer())


def few_rows(folder: Path) -> Path:
    return save_tokenizer(make_model(folder, vocab_size=40), train_tokenizer())


DOCUMENTS = (
    "name: inner\nmerge_method: linear\nmodels: [{{model: {0}}}]\ncalibrate: {{text: {1}}}\n---\n"
    "merge_method: linear\nmodels: [{{model: inner}}]\n"
)
COPY = (
    "merge_method: passthrough\nslices: [{{sources: [{{model: {0}, layer_range: [0, 6]}}]}}]\n"
    "calibrate: {{text: {1}}}\n"
)
REFUSED = {
    "an unknown key": (lambda t, f: recipe(t, damp=1), (), ["calibrate.damp (line 2): unknown key", "'damping'"]),
    "no text": (
        lambda t, f: COPY.replace("text: {1}", "seed: 1").format(tiny_model(), t), (), ["calibrate needs a text"],
    ),
    "only a path": (
        lambda t, f: COPY.replace("{{text: {1}}}", "{1}").format(tiny_model(), t), (),
        ["calibrate (line 3): must be a calibrate section"],
    ),
    "tokens as text": (lambda t, f: recipe(t, tokens="many"), (), ["calibrate.tokens", "whole number"]),
    "too few tokens": (lambda t, f: recipe(t, tokens=40), (), ["calibrate.tokens", "two windows: 2 x length"]),
    "no damping": (lambda t, f: recipe(t, damping=0), (), ["calibrate.damping", "more than 0"]),
    "damping as a list": (lambda t, f: recipe(t, damping=[1]), (), ["calibrate.damping", "a number"]),
    "all held out": (lambda t, f: recipe(t, held_out=1), (), ["calibrate.held_out", "less than 1"]),
    "another method": (lambda t, f: recipe(t, method="newton"), (), ["calibrate.method", "kfac | ridge"]),
    "a missing file": (lambda t, f: recipe(f / "none"), (), ["calibrate.text (line 2): the text cannot be read"]),
    "a folder": (lambda t, f: recipe(f), (), ["calibrate.text", "cannot be read", "directory"]),
    "a file of weights": (
        lambda t, f: recipe(tiny_model() / "model.safetensors"), (), ["calibrate.text", "not a text file"],
    ),
    "an empty file": (lambda t, f: recipe("/dev/null"), (), ["calibrate.text", "the text is empty"]),
    "an inner document": (lambda t, f: DOCUMENTS.format(tiny_model(), t), (), ["calibrate (line 4)", "last document"]),
    "no new layers": (lambda t, f: COPY.format(tiny_model(), t), (), ["calibrate (line 3)", "no new layers"]),
    "outputs that are not zero": (
        lambda t, f: recipe(t, preset="average"), (), ["calibrate (line 2)", "change what the model computes"],
    ),
    "a short text": (
        lambda t, f: recipe(t, tokens=40_000, length=20_000), (), ["calibrate.text", "the text is too short", "tokens"],
    ),
    "no tokenizer": (lambda t, f: recipe(t), ("--no-copy-tokenizer",), ["there is no tokenizer"]),
    "tokens without a row": (lambda t, f: recipe(t, few_rows(f / "m")), (), ["no row for", "token ids below 40"]),
    "norms behind": (
        lambda t, f: recipe(t, olmo2(f / "m"), "copy_next"), (), ["'olmo2' can be", "post_attention_layernorm"],
    ),
    "little memory": (
        lambda t, f: recipe(t), ("--max-memory", "400MB"), ["--max-memory", "calibration needs more memory"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_a_byte_is_written(run, text, tmp_path, case):
    build, options, reported = REFUSED[case]
    work = tmp_path / "work"
    work.mkdir()
    path = tmp_path / "recipe.yml"
    path.write_text(build(text, work))
    for more in (("--dry-run",), ()):
        error = run("merge", path, tmp_path / "out", "--device", "cpu", *options, *more, expect=2).err
        assert all(part in error for part in reported), error
    assert sorted(p.name for p in tmp_path.iterdir()) == ["recipe.yml", "work"]


def test_a_text_that_changes_between_plan_and_run(tmp_path):
    path = tmp_path / "prose.txt"
    path.write_text(PROSE)
    plan = api.plan(parse_recipe(recipe(path)))
    path.write_text(PROSE + " more")
    with pytest.raises(PlanError, match=r"calibrate\.text \(line 2\): the text has changed since the plan was made"):
        api.merge(plan, tmp_path / "out", api.RunOptions(device="cpu"))
    assert [p.name for p in tmp_path.iterdir()] == ["prose.txt"]


def test_weights_that_are_not_finite(run, text, tmp_path):
    """Found while the statistics are made: nothing gets OUT's name, and OUT stays as it was."""
    base = tmp_path / "base"
    base.mkdir()
    for file in tiny_model().iterdir():
        (base / file.name).write_bytes(file.read_bytes())
    tensors = load_file(base / "model.safetensors")
    tensors["model.layers.4.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    path = tmp_path / "recipe.yml"
    path.write_text(recipe(text, base))
    error = run("merge", path, tmp_path / "out", "--device", "cpu", expect=2).err
    assert "layer 1: the statistics are not finite" in error and "start over with --overwrite" in error
    assert not (tmp_path / "out").exists()
    path.write_text(recipe(text))
    run("merge", path, tmp_path / "out", "--device", "cpu", "--overwrite")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "out", "recipe.yml"]
