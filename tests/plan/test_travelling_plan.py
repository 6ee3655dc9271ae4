"""A plan is data: another process reads the pickled plan, makes its blocks in any order, and gets the same bytes."""

from __future__ import annotations

import pickle
import subprocess
import sys

import pytest
from support import make_model, weights, write_recipe

from deus_merge import api
from deus_merge.checkpoint import ShardWriter

RECIPES = {
    "up-scaled": "base_model: a\nupscale: {preset: opt_deus, insert: all}\n",
    "cast and scaled": "merge_method: passthrough\ndtype: bfloat16\nslices:\n"
    "- sources: [{model: a, layer_range: [0, 4]}]\n"
    "- sources: [{model: a, layer_range: [2, 4], parameters: {scale: 0.5}}]\n",
    "drawn": "merge_method: dare_ties\nbase_model: a\nmodels:\n- {model: b, parameters: {weight: 1, density: 0.5}}\n",
    "aligned": "merge_method: slerp\nbase_model: a\nalign: symmetry\nparameters: {t: 0.3}\n"
    "models: [{model: a}, {model: b}]\n",
    "learned": "base_model: a\nupscale: {preset: lesa, insert: all, parameters: {epochs: 1, width: 8}}\n",
    "documents": "name: tuned\nmerge_method: linear\nmodels:\n- {model: a, parameters: {weight: 0.5}}\n"
    "- {model: b, parameters: {weight: 0.5}}\n---\nbase_model: tuned\nupscale: {preset: copy_next, insert: all}\n",
}
WORKER = """
import pickle, sys
from pathlib import Path
import torch
from deus_merge import api
torch.set_num_threads(1)
plan = pickle.loads(Path(sys.argv[1]).read_bytes())
writer = api.ShardWriter(Path(sys.argv[2]), plan.shards)
done = []
api.run_blocks(plan, reversed(range(len(plan.blocks))), writer, device="cpu",
               on_block=lambda block, diagnostics: done.append(block.index))
writer.close()
assert done == list(reversed(range(len(plan.blocks))))
print(plan.hash)
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate("ab"):
        make_model(folder / name, layers=4, seed=seed)
    return folder


@pytest.mark.parametrize("name", RECIPES)
def test_another_process_makes_the_same_bytes(models, monkeypatch, tmp_path, name):
    monkeypatch.chdir(models)
    plan = api.plan(write_recipe(tmp_path / "recipe.yml", RECIPES[name]), max_shard_size=20_000)
    api.merge(plan, tmp_path / "whole")
    (tmp_path / "plan.pickle").write_bytes(pickle.dumps(plan))
    (tmp_path / "parts").mkdir()
    command = [sys.executable, "-c", WORKER, tmp_path / "plan.pickle", tmp_path / "parts"]
    done = subprocess.run(command, cwd="/", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == plan.hash
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert whole.keys() == parts.keys() and all(tensor.equal(parts[n]) for n, tensor in whole.items())


def test_a_pickled_plan_knows_a_changed_source(models, tmp_path):
    make_model(tmp_path / "model", layers=4, seed=3)
    plan = pickle.loads(pickle.dumps(api.plan(api.upscale_recipe(tmp_path / "model"))))
    make_model(tmp_path / "model", layers=4, seed=4)
    (tmp_path / "parts").mkdir()
    writer = ShardWriter(tmp_path / "parts", plan.shards)
    with pytest.raises(api.DeusMergeError, match="has changed"):
        api.run_blocks(plan, range(len(plan.blocks)), writer, device=None)
    writer.close()


def test_what_run_blocks_refuses(models, monkeypatch, tmp_path):
    """Before anything is written: no such block, no such file, no such device."""
    monkeypatch.chdir(models)
    plan = api.plan(write_recipe(tmp_path / "recipe.yml", RECIPES["up-scaled"]), max_shard_size=20_000)
    (tmp_path / "parts").mkdir()
    writer = api.ShardWriter(tmp_path / "parts", plan.shards[:1])
    last = len(plan.blocks) - 1
    for indices, device, message in (
        ([last + 1], "cpu", f"0 to {last}"),
        ([-1], "cpu", "no such block"),
        ([last], "cpu", "no file for a tensor"),
        ([0], "gpu", "unknown device"),
    ):
        with pytest.raises(api.DeusMergeError, match=message):
            api.run_blocks(plan, indices, writer, device=device)
    assert writer.bytes_written == 0
    writer.close()


def test_files_belong_to_whole_blocks(models, monkeypatch, tmp_path):
    """No file holds tensors of two blocks in part, also where one block makes layers far from each other."""
    monkeypatch.chdir(models)
    for name, text in RECIPES.items():
        recipe = write_recipe(tmp_path / "recipe.yml", text)
        whole = api.plan(recipe)
        largest = max(block.nbytes for block in whole.blocks)
        for limit in (largest // 2, largest, 2 * largest):
            plan = api.plan(recipe, max_shard_size=limit)
            assert len(plan.shards) > 1, name
            block_of = {output.name: block.index for block, output in plan.outputs}
            files: dict[int, set[str]] = {}
            for shard in plan.shards:
                for tensor in shard.tensors:
                    files.setdefault(block_of[tensor], set()).add(shard.filename)
            for block in plan.blocks:
                if len(files[block.index]) > 1:
                    assert block.nbytes > limit
                    own = [s for s in plan.shards if s.filename in files[block.index]]
                    assert {block_of[t] for s in own for t in s.tensors} == {block.index}
