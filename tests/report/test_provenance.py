"""What an output says about where it comes from: the recipe as written, digests that are the same on every machine."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from support import make_model, write_recipe

from deus_merge import training
from deus_merge.checkpoint.contents import contents_digest
from deus_merge.checkpoint.reader import Checkpoint
from deus_merge.report.manifest import read_manifest

ORIGINAL = "deus_merge.original.yml"
RECIPE = """\
# Which layers? Every second, as in notes.md.
base_model:   ./base   # the one of last week
upscale: {preset: copy_next, insert: {after: [1]}}

"""


@pytest.fixture
def base(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return make_model(tmp_path / "base", seed=0)


def data_of(out: Path | str) -> dict:
    return json.loads(Path(out, "deus_merge.json").read_text())


def test_the_recipe_as_it_was_written(base, run):
    write_recipe(Path("r.yml"), RECIPE)
    run("merge", "r.yml", "out")
    assert Path("out", ORIGINAL).read_bytes() == Path("r.yml").read_bytes()
    run("merge", "r.yml", "changed", "--set", "upscale.preset=llama_pro", "--model", "./base=base")
    text = Path("changed", ORIGINAL).read_text()
    assert text.startswith(RECIPE.rstrip()) and yaml.safe_load(text) == yaml.safe_load(RECIPE)
    assert "\n#   --model ./base=base\n#   --set upscale.preset=llama_pro\n" in text
    run("upscale", "base", "short", "--preset", "copy_next", "--insert", "{after: [1]}")
    assert yaml.safe_load(Path("short", ORIGINAL).read_text()) == yaml.safe_load(RECIPE.replace("./base", "base"))
    assert "# the one of last week" in Path("out/README.md").read_text()


def test_the_recipe_as_written_goes_with_the_output(base, run):
    """verify knows it, and calibrate, strip, training and the next growth treat it like the other recipe."""
    write_recipe(Path("r.yml"), RECIPE)
    run("merge", "r.yml", "out")
    run("upscale", "out", "twice", "--insert", "{after: [3]}")
    assert "out" in Path("twice", ORIGINAL).read_text()
    run("strip", "twice", "stripped")
    training.save_trained(training.prepare("out").model, "out", "saved")
    for folder in ("stripped", "saved"):
        assert Path(folder, ORIGINAL).read_bytes() == RECIPE.encode()
    run("verify", "stripped", "--strict", "--quick")
    run("upscale", "base", "out", "--overwrite", "--insert", "{after: [1]}")  # it does not stand in the way
    Path("out", ORIGINAL).write_text("merge_method: linear")
    found = run("verify", "out", "--quick", expect=3).out
    assert f"{ORIGINAL} is not as it was written" in " ".join(found.split())


def test_private_paths(base, run, tmp_path):
    write_recipe(Path("r.yml"), RECIPE.replace("./base", str(base)))
    run("merge", "r.yml", "out", "--private-paths")
    assert Path("out", ORIGINAL).read_bytes() == Path("r.yml").read_bytes()
    assert yaml.safe_load(Path("out/deus_merge.yml").read_text())["base_model"] == str(base)
    assert data_of("out")["sources"][0]["folder"] == str(base)
    assert str(tmp_path) not in Path("out/README.md").read_text()  # a card is for others
    run("verify", "out", "--strict", "--quick")
    assert str(base) in run("plan", "r.yml", "--expand", "--private-paths").out
    assert str(tmp_path) in run("export-training", "out", "--private-paths").out
    run("merge", "r.yml", "public")
    assert "<private>/base   # the one of last week" in Path("public", ORIGINAL).read_text()
    assert yaml.safe_load(Path("public", ORIGINAL).read_text())["base_model"] == "<private>/base"


def test_the_same_bytes_on_two_machines(run, tmp_path, monkeypatch):
    """Other folders, other time stamps: the same manifest, but for seconds."""
    documents = "name: mean\nmerge_method: linear\nmodels: [{model: base, parameters: {weight: 1}}]\n---\n"
    found: list = []
    for name in ("one", "two"):
        monkeypatch.chdir(_folder(tmp_path / name / ("deep" if found else ".")))
        make_model(Path("base"), seed=0)
        os.utime("base/model.safetensors", (1e9, 1e9 + len(found)))
        write_recipe(Path("r.yml"), documents + "base_model: mean\nupscale: {preset: opt_deus, insert: {after: [1]}}\n")
        run("merge", "r.yml", "out")
        run("upscale", "out", "twice", "--insert", "{after: [2]}")
        found.append([_timeless(data_of(out)) for out in ("out", "twice")])
    assert found[0] == found[1] and len(found[0][1]["lineage"]) == 2
    assert all("contents" in source for source in found[0][1]["sources"])


def _folder(path: Path) -> Path:
    path.mkdir(parents=True)
    return path


def _timeless(value: object) -> object:
    if isinstance(value, dict):
        return {k: _timeless(v) for k, v in value.items() if k not in ("seconds", "date", "sha256")}
    return [_timeless(item) for item in value] if isinstance(value, list) else value


def test_a_digest_of_contents_tells_fine_tunes_apart(base, run):
    """Headers and config are the same; one matrix of one layer is not."""
    shutil.copytree(base, "tuned")
    weights = load_file("tuned/model.safetensors")
    weights["model.layers.2.mlp.up_proj.weight"] += 0.01
    save_file(weights, "tuned/model.safetensors", {"format": "pt"})
    with Checkpoint.open(base) as one, Checkpoint.open("tuned") as other:
        assert one.fingerprint == other.fingerprint and contents_digest(one) != contents_digest(other)
    run("upscale", "tuned", "out", "--insert", "{after: [1]}")
    with Checkpoint.open("tuned") as other:
        assert read_manifest(Path("out")).sources[0].contents == contents_digest(other)


def test_a_digest_of_a_large_file_reads_little_of_it(base):
    """Samples from the first byte to the last; a changed tensor of a hundredth of the file is seen."""
    folder = _folder(Path("large"))
    shutil.copy(base / "config.json", folder)
    tensors = {f"t{i}": torch.zeros(1 << 18) for i in range(100)}  # 1 MiB each
    digests = set()
    for changed in (None, "t0", "t57", "t99"):
        weights = tensors | ({changed: tensors[changed] + 1} if changed else {})
        save_file(weights, folder / "model.safetensors")
        with Checkpoint.open(folder) as checkpoint:
            digests.add(contents_digest(checkpoint))
    assert len(digests) == 4


def test_a_source_that_the_manifest_does_not_name(base, run, tmp_path, monkeypatch):
    run("upscale", "base", "out", "--insert", "{after: [1]}")
    os.rename("base", "elsewhere")
    skipped = " ".join(run("verify", "out", "--quick").out.split())
    assert "cannot be read" in skipped and "--source base=PLACE says where it is" in skipped
    run("verify", "out", "--quick", "--strict", expect=3)
    run("verify", "out", "--quick", "--strict", "--source", "base=elsewhere")
    make_model(Path("wrong"), layers=5, seed=1)
    for place, reason in (("wrong", "has changed since"), ("nowhere", "cannot be read")):
        named = run("verify", "out", "--quick", "--source", f"base={place}", expect=2).err
        assert reason in named and "the model that the output was made from" in named and "=PLACE" not in named
    make_model(Path("alike"), seed=1)  # the same headers
    assert "differs from its source" in run("verify", "out", "--quick", "--source", "base=alike", expect=3).out
    for option, message in (("bass=elsewhere", "base"), ("base", "NAME=PLACE"), ("=x", "NAME=PLACE")):
        error = run("verify", "out", "--quick", "--source", option, expect=2).err
        assert message in error and "Traceback" not in error


def test_a_changed_source_of_a_merge_that_copies_nothing_is_reported(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("one", "two", "other")):
        make_model(tmp_path / name, layers=2, seed=seed)
    Path("r.yml").write_text(
        "merge_method: slerp\nbase_model: one\nparameters: {t: 0.5}\n"
        "slices: [{sources: [{model: one, layer_range: [0, 2]}, {model: two, layer_range: [0, 2]}]}]\n"
    )
    run("merge", "r.yml", "out")
    run("verify", "out", "--quick", "--strict")
    shutil.copy("other/model.safetensors", "two/model.safetensors")
    found = run("verify", "out", "--quick").out
    assert "no tensor was copied" in found and "has changed since" in " ".join(found.split())
    run("verify", "out", "--quick", "--strict", expect=3)


def test_a_folder_whose_name_is_not_utf8(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base = os.fsdecode(b"base\xff")
    make_model(tmp_path / base, layers=2)
    run("upscale", base, "out", "--insert", "all")
    run("verify", "out", "--quick", "--strict")
