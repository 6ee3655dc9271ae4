"""``recipes``, and the ways in which ``merge`` and ``plan`` get a recipe: file, stdin, name; ``--model``, ``--set``."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from support import make_model, weights

from deus_merge.recipe.schema import recipe_schema
from deus_merge.recipe.shipped import recipe_names, shipped

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*.yml"))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {name: make_model(root / name, layers=6, seed=seed) for seed, name in enumerate("ab")}


def test_every_recipe_is_listed_with_what_it_does(run):
    told = run("recipes").out
    for path in RECIPES:
        assert f"\n{path.stem} " in told
        first_line = path.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")
        assert shipped()[path.stem].summary.startswith(first_line.split(". ")[0].rstrip(".").rstrip()[:60])
    assert recipe_names() == [path.stem for path in RECIPES]
    assert run("recipes", "--json").json() == {name: entry.summary for name, entry in shipped().items()}
    assert all(30 < len(entry.summary) <= 150 for entry in shipped().values())


@pytest.mark.parametrize("path", [*RECIPES, *sorted((ROOT / "recipes/training").glob("*.py"))], ids=lambda p: p.name)
def test_a_recipe_is_printed_as_it_is(run, path):
    name = path.stem if path.suffix == ".yml" else f"training/{path.name}"
    assert run("recipes", name).out == path.read_text(encoding="utf-8")
    assert run("recipes", name, "--json").json() == {"name": name, "text": path.read_text(encoding="utf-8")}


def test_the_schema_is_printed(run):
    assert run("recipes", "--schema").json() == recipe_schema()
    assert json.loads((ROOT / "docs/recipe.schema.json").read_text(encoding="utf-8")) == recipe_schema()


def test_a_shipped_recipe_runs_by_its_name_on_another_model(run, models, tmp_path, monkeypatch):
    """The recipe beside the output is what was run: it makes the same plan again."""
    monkeypatch.chdir(tmp_path)
    changes = ("--model", models["a"], "--set", "upscale.insert={count: 2}", "--set", "dtype=float16")
    done = run("merge", "copy_next", tmp_path / "out", *changes)
    assert "recipe copy_next, which ships with deus-merge" in done.err
    record = json.loads((tmp_path / "out/deus_merge.json").read_text())
    assert record["new_layers"] == [4, 6]
    assert {str(t.dtype) for t in weights(tmp_path / "out").values()} == {"torch.float16"}
    recipe = yaml.safe_load((tmp_path / "out/deus_merge.yml").read_text())
    base = os.path.normpath(tmp_path / "out" / recipe["base_model"])
    assert (base, recipe["dtype"]) == (str(models["a"]), "float16")
    written = run("plan", tmp_path / "out/deus_merge.yml", "--json").json()
    assert (
        written["plan_hash"] == record["plan_hash"] == run("plan", "copy_next", *changes, "--json").json()["plan_hash"]
    )
    assert "which ships" not in run("merge", "copy_next", tmp_path / "two", *changes, "--quiet", "--dry-run").err


def test_a_file_takes_precedence_over_a_shipped_recipe(run, models, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("stack").write_text(f"merge_method: passthrough\nmodels: [{{model: {models['a']}}}]\n")
    done = run("plan", "stack", "--json")
    assert done.json()["num_layers"] == 6 and "ships" not in done.err


def test_old_and_new_models(run, models):
    names = ("HuggingFaceTB/SmolLM2-135M-Instruct", "HuggingFaceTB/SmolLM2-135M")
    pairs = [
        part for name, folder in zip(names, models.values(), strict=True) for part in ("--model", f"{name}={folder}")
    ]
    expanded = yaml.safe_load(run("plan", "ties", *pairs, "--expand", "--private-paths").out)
    assert expanded["base_model"] == str(models["b"])
    assert [s["model"] for s in expanded["slices"][0]["sources"]] == [str(models["a"]), str(models["b"])]


@pytest.mark.parametrize("command", ["plan", "merge"])
def test_stdin(run, models, tmp_path, monkeypatch, command):
    text = f"merge_method: passthrough\nslices: [{{sources: [{{model: {models['a']}, layer_range: [0, 2]}}]}}]\n"
    out = [tmp_path / "out"] if command == "merge" else []

    def from_stdin(data: bytes, *arguments, **more):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
        return run(command, "-", *out, *arguments, **more)

    assert from_stdin(text.encode(), "--json").json()["num_layers"] == 2
    wrong = from_stdin(text.replace("slices", "slcies").encode(), expect=2).err
    assert "slcies (line 2): unknown key" in wrong and "did you mean 'slices'?" in wrong
    assert "stdin: the text is empty" in from_stdin(b"", expect=2).err
    assert "stdin: the recipe cannot be read: not UTF-8 text" in from_stdin(b"\xff", expect=2).err


WRONG = {
    "name": (("recipes", "solr"), "no recipe 'solr' ships", "did you mean 'solar'?"),
    "schema and name": (("recipes", "solar", "--schema"), "leave NAME out"),
    "recipe": (("plan", "sloar"), "sloar: the recipe cannot be read: No such file", "did you mean 'solar'?"),
    "its old path": (("plan", "recipes/solar.yml"), "'solar' without a folder and a suffix is the one that ships"),
    "no such recipe": (("plan", "nothing"), "deus-merge recipes lists those that ship"),
    "model": (("plan", "mixed", "--model", "x"), "--model x: the recipe has 2 models", "OLD=NEW, where OLD is one of"),
    "place of a model": (("plan", "solar", "--model", "./nowhere"), "base_model (--model): ./nowhere: no such folder"),
    "set a key": (("plan", "solar", "--set", "upscle.insert=all"), "upscle (--set): unknown key", "mean 'upscale'?"),
    "set a parameter": (("plan", "opt_deus", "--model", "$a", "--set", "upscale.parameters.rge=3"),
                        "upscale.parameters.rge (--set): ot_fuse has no parameter 'rge'", "did you mean 'reg'?"),
    "set a value": (("plan", "ties", "--set", "models.0.parameters.weight=much"),
                    "models[0].parameters.weight (--set): not a value of weight", "got:      'much'"),
    "set an entry": (("plan", "ties", "--set", "models.4.model=x"), "--set models.4.model: models is a list", "0 to 0"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_ways(run, models, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    arguments, *fragments = WRONG[name]
    done = run(*(str(models["a"]) if a == "$a" else a for a in arguments), expect=2)
    assert done.out == "" and all(fragment in done.err for fragment in fragments), done.err


def test_defaults_are_shown_as_recipes_write_them(run):
    told = run("methods", "ot_fuse").out
    assert "[experts, neurons, heads, values, rotary]" in told
    for python in ("True", "False", "None", "('"):
        assert python not in told
    rows = {line.split()[0]: line for line in told.splitlines() if line.strip()}
    assert " true " in rows["unit_rows"] and " null " in rows["match_score"] and " auto " in rows["reg"]


@pytest.mark.parametrize(
    "arguments", [("methods", "ot_fuse"), ("methods", "--json"), ("recipes", "mixed"), ("--help",)]
)
def test_a_reader_that_stops_to_read_is_no_error(arguments):
    """As with ``| head -1``: the pipe is closed before the output is written."""
    command = [sys.executable, "-m", "deus_merge", *arguments]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT)
    assert child.stdout and child.stderr
    child.stdout.close()
    told = child.stderr.read()
    assert (child.wait(60), told) == (0, b"")
