"""Files that people share do not name the folders of the machine that wrote them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from support import TEXT, make_model, save_tokenizer, train_tokenizer, write_recipe

from deus_merge import training
from deus_merge.report.manifest import read_manifest
from deus_merge.report.shareable import PRIVATE, found_path, shared_path, shared_text

SECRET = "alices-secret-folder"
COMPARE = ("--tokens", 512, "--batch", 2, "--length", 32, "--held-out", 2, "--threads", 1, "--device", "cpu", "--lr",
           3e-3, "--seeds", 1, "--precision", "float32")  # fmt: skip


def files_with_secret(root: Path) -> list[str]:
    """Files below a folder that name it, its path, or the home of whoever ran this; folders' own names do not count."""
    marks = [mark.encode() for mark in (SECRET, f"{root.parent}/", f"{Path.home()}/")]
    files = [f for f in root.rglob("*") if f.is_file()]
    return [f.relative_to(root).as_posix() for f in files if any(mark in f.read_bytes() for mark in marks)]


@pytest.fixture
def secret(tmp_path, monkeypatch) -> Path:
    root = tmp_path / SECRET
    make_model(root / "base", seed=0)
    save_tokenizer(root / "base", train_tokenizer(size=100), bos_token="<s>", eos_token="</s>")
    make_model(root / "other", seed=1)
    (root / "text.txt").write_text(TEXT * 40)
    monkeypatch.chdir(tmp_path)
    return root


def test_no_command_writes_the_name_of_a_folder(secret, run, tmp_path):
    """Every path is given absolutely, as the command line of somebody who does not think of it."""
    base, other, text = secret / "base", secret / "other", secret / "text.txt"
    escaped = str(base).replace("secret", "\\u0073ecret")  # no search of the text finds it
    recipes = {
        "linear": f"# in {secret}/notes.txt, see {Path.home()}/more\nmerge_method: linear\nmodels:\n"
        f"- {{model: '{base}', parameters: {{weight: 1}}}}\n- {{model: {other}, parameters: {{weight: 1}}}}\n",
        "ties": f"merge_method: ties\nbase_model: {base}\n"
        f"models: [{{model: {other}, parameters: {{weight: 1, density: 0.5}}}}]\n",
        "slices": f"merge_method: passthrough\nslices:\n- sources: [{{model: {base}, layer_range: [0, 3]}}]\n"
        f"- sources: [{{model: {other}, layer_range: [1, 4]}}]\n",
        "documents": f"name: mean\nmerge_method: linear\nmodels: [{{model: {base}, parameters: {{weight: 1}}}}]\n---\n"
        "base_model: mean\nupscale: {preset: opt_deus, insert: {after: [1]}}\n",
        "calibrated": f"base_model: {base}\nupscale: {{preset: opt_deus, insert: {{after: [1]}}}}\n"
        f"calibrate: {{text: {text}, length: 32}}\n",
        "escaped": f'base_model: "{escaped}"\nupscale: {{insert: {{after: [1]}}}}\n',
    }
    printed = []
    for name, recipe in recipes.items():
        file = write_recipe(tmp_path / f"{name}.yml", recipe)
        run("merge", file, secret / f"out-{name}")
        printed += [run("plan", file, "--expand").out, run("plan", file, "--expand", "--json").out]
    run("merge", "opt_deus", secret / "out-shipped", "--model", base, "--set", "upscale.insert={after: [1]}")
    deeper, trained = secret / "deeper", secret / "trained"
    run("upscale", base, deeper, "--insert", "{after: [1]}")
    run("upscale", deeper, secret / "twice", "--insert", "{after: [2]}")
    run("calibrate", deeper, secret / "set", "--text", text, "--length", "32")
    run("report", deeper)
    run("strip", secret / "twice", secret / "stripped")
    run("inspect", base, "--plot", secret / "similarity.svg")
    (secret / "long.txt").write_text("\n".join(f"line {i} of the module reads {i * i} bytes" for i in range(12_000)))
    compared = (
        "--text",
        secret / "long.txt",
        "--init",
        "copy_next",
        "--init",
        _recipe_of(secret, base),
        "--insert",
        "{after: [1]}",
    )
    run("compare", base, *compared, "--out", secret / "compared", *COMPARE)
    prepared = training.prepare(deeper)
    training.save_trained(prepared.model, deeper, trained)
    prepared.model.save_pretrained(secret / "carried")
    training.carry_manifest(deeper, secret / "carried")
    printed += [run("export-training", secret / "carried", "--for", name).out for name in ("trainer", "axolotl")]
    os.rename(base, secret / "moved")  # what cannot be checked is said without the folder, too
    run("report", deeper, "--html", secret / "page.html")

    assert len(list(secret.rglob("deus_merge.json"))) >= 13
    assert files_with_secret(secret) == []
    assert not [text for text in printed if str(tmp_path) in text or f"{Path.home()}/" in text]
    os.rename(secret / "moved", base)
    for out in ("deeper", "twice", "out-slices", "out-documents", "set", "stripped", "trained"):
        found = run("verify", secret / out, "--json", "--quick").json()
        skipped = {check["name"]: check["detail"] for check in found["checks"] if check["passed"] is None}
        assert "copied tensors" not in skipped, (out, skipped)  # the sources are found again


def _recipe_of(secret: Path, base: Path) -> Path:
    return write_recipe(secret.parent / "init.yml", f"base_model: {base}\nupscale: {{insert: {{after: [1]}}}}\n")


def test_an_output_moves_together_with_its_base(secret, run, tmp_path):
    run("upscale", secret / "base", secret / "deeper")
    recipe = (secret / "deeper/deus_merge.yml").read_text()
    assert "../base" in recipe
    os.rename(secret, tmp_path / "moved")
    deeper = tmp_path / "moved/deeper"
    assert read_manifest(deeper).sources[0].folder == str(tmp_path / "moved/base")
    run("verify", deeper, "--strict")
    run("merge", deeper / "deus_merge.yml", tmp_path / "again")  # from another working directory
    assert (tmp_path / "again/model.safetensors").read_bytes() == (deeper / "model.safetensors").read_bytes()


def test_paths(tmp_path, monkeypatch):
    home, cache = tmp_path / "homes/alice", tmp_path / "homes/alice/cache"
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("HF_HUB_CACHE", str(cache))
    snapshot = cache / "models--org--name/snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    rows = [
        (home / "models/base", home / "out", "../models/base"),
        (home / "out/base", home / "out", "./base"),
        (tmp_path / "homes/bob/base", home / "out", f"{PRIVATE}base"),  # what they share lies above the home
        (snapshot, home / "out", "org/name@" + "0" * 40),
        (Path("/base"), home / "out", f"{PRIVATE}base"),
    ]
    for path, out, text in rows:
        assert shared_path(path, out) == text
        assert shared_path(text, out) == text if text.startswith(PRIVATE) else found_path(text, out) == str(path)


def test_a_source_whose_folder_is_not_written(secret, run, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "elsewhere/alice"))  # so that what both share lies above it
    (tmp_path / "elsewhere/alice").mkdir(parents=True)
    run("upscale", secret / "base", tmp_path / "out")
    data = json.loads((tmp_path / "out/deus_merge.json").read_text())
    assert data["sources"][0]["folder"] == f"{PRIVATE}base" and files_with_secret(tmp_path / "out") == []
    run("verify", tmp_path / "out", "--quick", "--strict")  # this machine remembers it
    assert run("strip", tmp_path / "out", tmp_path / "again", "--json").json()["equal_to_base"] > 0
    monkeypatch.setenv("DEUS_MERGE_CACHE", str(tmp_path / "another-machine"))
    found = run("verify", tmp_path / "out", "--quick").out
    assert "the manifest does not name the folder of source base; --source base=PLACE says where it is" in " ".join(
        found.split()
    )


def test_texts(tmp_path, monkeypatch):
    """Absolute paths become names, wherever they are; what only looks like one stays."""
    home, cache = tmp_path / "homes/alice", tmp_path / "cache"
    snapshot = cache / "models--org--name/snapshots" / ("0" * 40)
    for folder in (home, snapshot, tmp_path / "my models/a b"):
        folder.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    known = [str(tmp_path / "my models/a b"), str(tmp_path / "my models"), str(snapshot)]
    rows = {
        f"# see {home}/notes/a.md, then sleep": "# see <private>/a.md, then sleep",
        f"# me@host:{home}/notes/a.md, <{home}/notes>": "# me@host:<private>/a.md, <<private>/notes>",
        f"# $PWD:{home}/notes/a.md:{home}/notes": "# $PWD:<private>/a.md:<private>/notes",
        f"# file://{home}/notes/a.md -{home}/notes": "# file:<private>/a.md -<private>/notes",
        f"model: '{tmp_path}/my models/a b'  # {tmp_path}/my models": "model: '<private>/a b'  # <private>/my models",
        f"[{{model: {snapshot}, x: 1}}]": f"[{{model: org/name@{'0' * 40}, x: 1}}]",
        f"{snapshot}+{home}/adapter": f"org/name@{'0' * 40}+<private>/adapter",
        f"{tmp_path}/never/there/file {tmp_path}/homes": f"{tmp_path}/never/there/file <private>/homes",
        f"file://{home}/x": "file:<private>/x",
    }
    for text, expected in rows.items():
        assert shared_text(text, known) == expected
    for text in ("https://a.example/tmp/x", "and/or 1/2 </s> ~/models/base ../up/there ./a/b", "/tmp", "/", "// a"):
        assert shared_text(text, known) == text
