"""Every recipe in recipes/ runs unchanged: on a 30-layer substitute by default, on the real model when slow."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from support import load, make_model

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yml"))
DEPTH = {
    "opt_deus": 45, "opt_deus_paper": 45, "opt_deus_script": 45, "llama_pro": 35, "copy_next": 38, "average": 45,
    "average_zero": 45, "lesa": 45, "solar": 44, "stack": 60, "mixed": 39, "aligned": 30, "opt_deus_partial": 45,
    "ties": 30, "dare_ties": 30, "two_documents": 39,
}  # fmt: skip


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory):
    """A folder in which the recipes' hub names are local models: a folder that exists goes before the hub."""
    folder = tmp_path_factory.mktemp("hub")
    for seed, name in enumerate(("SmolLM2-135M-Instruct", "SmolLM2-135M")):
        make_model(folder / "HuggingFaceTB" / name, layers=30, tied=True, seed=seed)
    return folder


def test_every_recipe_has_its_depth_here():
    assert {r.stem for r in RECIPES} == set(DEPTH)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: r.stem)
def test_recipe(run, stand_ins, monkeypatch, tmp_path, recipe):
    monkeypatch.chdir(stand_ins)
    planned = run("plan", recipe, "--json").json()
    assert planned["num_layers"] == DEPTH[recipe.stem]
    run("merge", recipe, tmp_path / "out")
    assert load(tmp_path / "out").config.num_hidden_layers == DEPTH[recipe.stem]
    record = json.loads((tmp_path / "out/deus_merge.json").read_text())
    assert record["plan_hash"] == planned["plan_hash"]
    assert len(record["new_layers"]) == DEPTH[recipe.stem] - 30
    expanded = run("plan", recipe, "--expand").out
    again = tmp_path / "expanded.yml"
    again.write_text(expanded)
    assert run("plan", again, "--json").json()["plan_hash"] == planned["plan_hash"]


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: r.stem)
def test_recipe_on_smollm2(run, real, monkeypatch, tmp_path, recipe):
    """The real model under both names; presets have their own slow test, so plans are cheap here."""
    (tmp_path / "HuggingFaceTB").mkdir()
    for name in ("SmolLM2-135M-Instruct", "SmolLM2-135M"):
        os.symlink(real, tmp_path / "HuggingFaceTB" / name)
    monkeypatch.chdir(tmp_path)
    if recipe.stem in ("opt_deus", "opt_deus_paper", "opt_deus_script", "lesa"):  # lesa: half a minute
        run("merge", recipe, tmp_path / "out", "--dry-run")
        return
    run("merge", recipe, tmp_path / "out", "--no-verify")
    assert run("verify", tmp_path / "out", "--json").json()["passed"]
