"""Recipes of several documents: the same bytes as running them one after the other through folders."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import yaml
from safetensors.torch import save_file
from support import load, make_model, save_tokenizer, train_tokenizer, weights, write_recipe

from deus_merge.recipe.reader import parse_recipe
from deus_merge.recipe.writer import dump_recipe
from deus_merge.run.compute import BlockComputer


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    """A base model and three more, and a folder for recipes that name them."""
    root = tmp_path_factory.mktemp("family")
    for seed, name in enumerate(("base", "a", "b", "c")):
        make_model(root / name, layers=4, seed=seed, dtype=torch.bfloat16, tied=True)
        save_tokenizer(root / name, train_tokenizer())
    make_model(root / "qwen", "qwen2", layers=4, dtype=torch.bfloat16, use_sliding_window=True, max_window_layers=2)
    return root


TIES = """
name: tuned
merge_method: ties
base_model: base
models: [{model: a}, {model: b}, {model: c}]
parameters: {weight: 0.5, density: 0.6}
"""
CHAINS = {
    # the mixed recipe
    "ties, up-scaled": (TIES, "base_model: tuned\nupscale: {insert: top_half}\n"),
    "up-scaled everywhere": (TIES, "base_model: tuned\nupscale: {insert: all, parameters: {layers_per_gap: 2}}\n"),
    "drawn at random": (
        TIES.replace("ties", "dare_ties"),
        "merge_method: slerp\nbase_model: tuned\nmodels: [{model: a}]\nparameters: {t: 0.3}\n",
    ),
    "aligned below, up-scaled above": (
        "name: aligned\nmerge_method: linear\nalign: symmetry\nmodels: [{model: base}, {model: a}]\n"
        "parameters: {weight: 1}\n",
        "name: soft\nmerge_method: slerp\nbase_model: base\nmodels: [{model: b}]\nparameters: {t: 0.4}\n",
        "base_model: soft\ndtype: float32\nslices:\n"
        "  - {merge_method: passthrough, sources: [{model: soft, layer_range: [0, 2]}]}\n"
        "  - {merge_method: ot_fuse, sources: [{model: aligned, layer_range: [2, 4]}]}\n",
    ),
    "one within another": (
        "name: one\nmerge_method: linear\nmodels: [{model: a}, {model: b}]\nparameters: {weight: 0.5}\n",
        "name: two\nbase_model: one\nupscale: {preset: solar}\n",
        "name: three\nmerge_method: linear\ndtype: float32\nmodels: [{model: two}, {model: two}]\n"
        "parameters: {weight: 1}\n",
        "merge_method: passthrough\nout_dtype: bfloat16\nslices:\n"
        "  - {sources: [{model: three, layer_range: [0, 3]}]}\n"
        "  - {sources: [{model: two, layer_range: [1, 4]}]}\n"
        "  - {sources: [{model: one}]}\ntokenizer_source: one\n",
    ),
    "three layers of it at once": (
        TIES,
        "merge_method: linear\nbase_model: tuned\nslices:\n  - sources:\n"
        "      - {model: tuned, layer_range: [0, 2]}\n      - {model: tuned, layer_range: [1, 3]}\n"
        "      - {model: tuned, layer_range: [2, 4]}\nparameters: {weight: 1}\n",
    ),
    "only copies": (
        "name: short\nmerge_method: passthrough\nslices: [{sources: [{model: base, layer_range: [1, 4]}]}]\n",
        "base_model: short\nupscale: {preset: llama_pro, insert: all}\n",
    ),
    "zeros": (
        "name: deep\nbase_model: base\nupscale: {preset: copy_next, insert: all}\n",
        "merge_method: linear\nmodels: [{model: deep}, {model: deep}]\nparameters: {weight: 0.7, normalize: false}\n",
    ),
    "lists of layers": (
        "name: deep\nbase_model: qwen\nupscale: {insert: {after: [1]}}\n",
        "base_model: deep\nchat_template: '{{ messages }}'\nupscale: {insert: top_half}\n",
    ),
}


def model_files(folder):
    names = ("deus_merge.json", "deus_merge.yml", "deus_merge.original.yml", "README.md")
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name not in names}


@pytest.mark.parametrize("case", CHAINS)
def test_as_one_after_the_other(run, family, monkeypatch, tmp_path, case):
    """Weights, headers, config and tokenizer are those of a run of each document into a folder of its name."""
    documents, options = CHAINS[case], ("--seed", 3, "--max-shard-size", "60kB")
    order = documents[::-1] if case == "one within another" else documents  # it does not matter
    monkeypatch.chdir(family)
    recipe = write_recipe(tmp_path / "r.yml", "---\n".join(order))
    planned = run("plan", recipe, "--json").json()
    run("merge", recipe, tmp_path / "ours", *options)
    run("merge", recipe, tmp_path / "little", *options, "--max-memory", planned["minimum_memory_bytes"])
    work = tmp_path / "work"
    work.mkdir()
    for model in family.iterdir():
        (work / model.name).symlink_to(model)
    monkeypatch.chdir(work)
    for text in documents:
        name = yaml.safe_load(text).get("name")
        alone = write_recipe(tmp_path / "one.yml", text.replace(f"name: {name}\n", ""))
        run("merge", alone, work / name if name else tmp_path / "theirs", *options)
    assert model_files(tmp_path / "ours") == model_files(tmp_path / "theirs") == model_files(tmp_path / "little")
    records = [json.loads((tmp_path / out / "deus_merge.json").read_text()) for out in ("ours", "theirs")]
    grown = [record.get("lineage", []) for record in records]
    ours, theirs = ([entry["new_layers"] for entry in g[:-1] if entry["new_layers"]] for g in grown)
    assert ours == theirs
    load(tmp_path / "ours")
    assert run("verify", tmp_path / "ours", "--json").json()["passed"]
    monkeypatch.chdir("/")
    again = run("plan", tmp_path / "ours/deus_merge.yml", *options[2:], "--json").json()
    assert again["plan_hash"] == records[0]["plan_hash"]
    assert {d["name"] for d in records[0]["documents"]} == {d["name"] for d in again["documents"]}


@pytest.fixture
def computed(monkeypatch):
    """(document, block) of every block of which something is computed, in this order."""
    calls, compute = [], BlockComputer.compute

    def counted(self, block, *more):
        calls.append((self.plan.recipe.name, block.index))
        return compute(self, block, *more)

    monkeypatch.setattr(BlockComputer, "compute", counted)
    return calls


@pytest.mark.parametrize("case", CHAINS)
def test_blocks_are_computed_as_often_as_planned(run, family, monkeypatch, tmp_path, computed, case):
    monkeypatch.chdir(family)
    recipe = write_recipe(tmp_path / "r.yml", "---\n".join(CHAINS[case]))
    planned = run("plan", recipe, "--json").json()["documents"]
    run("merge", recipe, tmp_path / "out")
    for document in planned:
        assert sum(name == document["name"] for name, _ in computed) == document["blocks_computed"]
        if case != "one within another":  # where layers come back after others
            assert document["blocks_computed"] <= document["blocks"]


def test_only_tensors_that_are_read_are_computed(run, family, monkeypatch, tmp_path, computed):
    """What the last document copies from elsewhere costs nothing."""
    monkeypatch.chdir(family)
    last = (
        "base_model: base\nmerge_method: passthrough\nslices:\n"
        "  - {sources: [{model: base, layer_range: [0, 3]}]}\n  - {sources: [{model: tuned, layer_range: [3, 4]}]}\n"
    )
    run("merge", write_recipe(tmp_path / "r.yml", f"{TIES}---\n{last}"), tmp_path / "out")
    assert [block for name, block in computed if name == "tuned"] == [4]


def test_a_run_that_was_interrupted_goes_on(run, family, monkeypatch, tmp_path):
    monkeypatch.chdir(family)
    recipe = write_recipe(tmp_path / "r.yml", "---\n".join(CHAINS["drawn at random"]))
    run("merge", recipe, tmp_path / "whole")
    compute, stopped = BlockComputer.compute, []

    def stops(self, block, *more):
        if self.plan.recipe.name == "tuned" and block.index == 3 and not stopped:
            stopped.append(True)
            raise KeyboardInterrupt
        return compute(self, block, *more)

    monkeypatch.setattr(BlockComputer, "compute", stops)
    assert "3 finished blocks are saved" in run("merge", recipe, tmp_path / "out", expect=130).err
    other = write_recipe(tmp_path / "other.yml", recipe.read_text().replace("density: 0.6", "density: 0.7"))
    assert "had another plan" in run("merge", other, tmp_path / "out", "--resume", expect=2).err
    run("merge", recipe, tmp_path / "out", "--resume")
    assert model_files(tmp_path / "out") == model_files(tmp_path / "whole")


def test_what_is_wrong_in_a_document_is_told_with_its_name(run, family, monkeypatch, tmp_path):
    monkeypatch.chdir(family)
    shutil.copytree(family / "a", tmp_path / "nan")
    tensors = weights(tmp_path / "nan")
    tensors["model.layers.2.mlp.up_proj.weight"][3, 4] = float("nan")
    save_file(tensors, tmp_path / "nan/model.safetensors", {"format": "pt"})
    text = "---\n".join(CHAINS["ties, up-scaled"]).replace("model: a", f"model: {tmp_path}/nan")
    done = run("merge", write_recipe(tmp_path / "r.yml", text), tmp_path / "out", expect=2)
    assert "layer 2: document tuned: layer 2" in done.err and "becomes NaN" in done.err


def test_documents_round_trip(family, monkeypatch):
    monkeypatch.chdir(family)
    for documents in CHAINS.values():
        recipe = parse_recipe(dump_recipe(parse_recipe("---\n".join(documents))))
        assert parse_recipe(dump_recipe(recipe)) == recipe
        assert len(recipe.documents) == len(documents) - 1


def test_a_name_in_a_recipe_of_one_document_means_nothing(run, family, monkeypatch, tmp_path):
    monkeypatch.chdir(family)
    planned = run("plan", write_recipe(tmp_path / "r.yml", TIES + "---\n"), "--expand").out
    assert "name:" not in planned and "---" not in planned


def test_plan_shows_the_documents(run, family, monkeypatch, tmp_path):
    monkeypatch.chdir(family)
    recipe = write_recipe(tmp_path / "r.yml", "---\n".join(CHAINS["ties, up-scaled"]))
    shown = run("plan", recipe).out
    assert "document tuned, not written: 6 blocks are computed when they are read, 2 at a time in memory" in shown
    assert "A = tuned  [llama, 4 layers, base]" in shown
    expanded = run("plan", recipe, "--expand", "--json").json()
    assert [d.get("name") for d in expanded] == ["tuned", None] and len(expanded[1]["slices"]) == 2
    run("merge", recipe, tmp_path / "out", "--dry-run")
    assert not (tmp_path / "out").exists()


LAST = "base_model: tuned\nupscale: {}\n"
WRONG = {
    "no result": ((TIES, f"name: deep\n{LAST}"), "every document has a name", "document without a name: the result"),
    "two results": ((TIES, LAST, LAST), "recipe.yml (line 11): two documents have no name"),
    "one name": ((TIES, TIES, LAST), "name (line 9): two documents have one name"),
    "unused": ((TIES, "base_model: base\nupscale: {}\n"), "name (line 2): no document uses this one"),
    "itself": ((TIES.replace("model: b", "model: tuned"), LAST), "models[1].model (line 5)", "tuned -> tuned"),
    "a circle": (
        (TIES.replace("model: b", "model: deep"), "name: deep\nbase_model: tuned\nupscale: {}\n", LAST),
        "base_model (line 9): circular dependency between documents", "tuned -> deep -> tuned",
    ),
    "misspelt": (
        (TIES, "merge_method: passthrough\nmodels: [{model: tuned}]\nbase_model: tunde\n"),
        "base_model (line 10): tunde: no such folder", "did you mean 'tuned'?",
    ),
    "a plus": ((TIES.replace("name: tuned", "name: a+b"), LAST), "name (line 2): not a valid name of a document"),
    "no text": ((TIES.replace("name: tuned", "name: 3"), LAST), "name (line 2): wrong value", "a name for other"),
    "in the first": ((TIES.replace("density", "densty"), LAST), "parameters.densty (line 6)", "mean 'density'?"),
    "in the last": ((TIES, "base_model: tuned\nupscale: {presett: solar}\n"), "upscale.presett (line 9)"),
    "too deep": (
        (TIES, "merge_method: passthrough\nslices: [{sources: [{model: tuned, layer_range: [0, 9]}]}]\n"),
        "beyond the 4 layers of tuned",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_wrong_documents(run, family, monkeypatch, tmp_path, case):
    monkeypatch.chdir(family)
    documents, *fragments = WRONG[case]
    recipe = write_recipe(tmp_path / "recipe.yml", "---\n".join(documents))
    told = run("merge", recipe, tmp_path / "out", expect=2).err
    for fragment in fragments:
        assert fragment in told, told
    assert not (tmp_path / "out").exists()
