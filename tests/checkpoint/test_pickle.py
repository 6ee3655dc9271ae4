"""Pickled weights: the same output as from safetensors, with leave only, and nothing in them runs."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support import make_model, weights

from deus_merge import api
from deus_merge.checkpoint.pickled import PickledCheckpoint
from deus_merge.core.errors import CheckpointError

RECIPE = "base_model: {model}\ndtype: {dtype}\nupscale: {{preset: average, insert: all}}\n"


def pickled(source: Path, folder: Path, *, shards: int = 1, zipped: bool = True, more: dict | None = None) -> Path:
    """The model with its weights as torch.save writes them."""
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    tensors = load_file(source / "model.safetensors") | (more or {})
    if shards == 1:
        torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
        return folder
    weight_map = {}
    for i in range(shards):
        name = f"pytorch_model-{i + 1:05d}-of-{shards:05d}.bin"
        part = dict(list(tensors.items())[i::shards])
        torch.save(part, folder / name, _use_new_zipfile_serialization=zipped)
        weight_map |= dict.fromkeys(part, name)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "base", layers=3)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "older"])
@pytest.mark.parametrize("shards", [1, 3])
def test_the_output_is_the_same(run, base, tmp_path, shards, zipped):
    model = pickled(base, tmp_path / "model", shards=shards, zipped=zipped)
    for name, folder, options in (("plain", base, ()), ("unpickled", model, ("--allow-pickle",))):
        recipe = tmp_path / f"{name}.yml"
        for dtype in ("float32", "bfloat16"):
            recipe.write_text(RECIPE.format(model=folder, dtype=dtype))
            run("merge", recipe, tmp_path / f"{name}-{dtype}", *options)
            run("verify", tmp_path / f"{name}-{dtype}")
    for dtype in ("float32", "bfloat16"):
        ours, theirs = (tmp_path / f"{name}-{dtype}/model.safetensors" for name in ("unpickled", "plain"))
        assert ours.read_bytes() == theirs.read_bytes()


def test_a_deeper_pickled_model_still_computes_what_it_did(run, base, tmp_path):
    model = pickled(base, tmp_path / "model")
    done = run("upscale", model, tmp_path / "out", "--preset", "copy_next", "--allow-pickle", "--json")
    assert done.json()["function_preserving"]
    assert run("inspect", model, "--allow-pickle", "--json").json()["layers"] == 3


def test_without_leave_it_is_refused(run, base, tmp_path):
    model = pickled(base, tmp_path / "model", shards=2)
    (tmp_path / "recipe.yml").write_text(RECIPE.format(model=model, dtype="float32"))
    for command in (("merge", tmp_path / "recipe.yml", tmp_path / "out"), ("plan", tmp_path / "recipe.yml"),
                    ("upscale", model, tmp_path / "out"), ("inspect", model)):  # fmt: skip
        error = run(*command, expect=2).err
        assert "no safetensors file" in error and "a pickle is a program: --allow-pickle reads its tensors" in error
    run("plan", tmp_path / "recipe.yml", "--allow-pickle")


def test_safetensors_go_before_pickles(run, base, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(base, model)
    (model / "pytorch_model.bin").write_bytes(b"no pickle at all")
    run("upscale", model, tmp_path / "out", "--preset", "copy_next", "--allow-pickle")


def test_tied_weights_are_stored_once(run, tmp_path):
    base = make_model(tmp_path / "base", layers=2, tied=True)
    tensors = load_file(base / "model.safetensors")
    model = tmp_path / "model"
    shutil.copytree(base, model, ignore=shutil.ignore_patterns("*.safetensors"))
    embeddings = tensors["model.embed_tokens.weight"]
    torch.save(tensors | {"lm_head.weight": embeddings}, model / "pytorch_model.bin")
    run("upscale", model, tmp_path / "out", "--preset", "copy_next", "--allow-pickle")
    run("verify", tmp_path / "out")
    assert "lm_head.weight" not in weights(tmp_path / "out")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    run("upscale", model, tmp_path / "untied", "--preset", "copy_next", "--allow-pickle")
    run("verify", tmp_path / "untied")
    assert torch.equal(weights(tmp_path / "untied")["lm_head.weight"], embeddings)


def test_views_parameters_and_whole_numbers(run, base, tmp_path):
    """Whatever a state dict holds: rows of a larger tensor, transposed ones, parameters, buffers of other kinds."""
    tensors = load_file(base / "model.safetensors")
    name = "model.layers.0.self_attn.{}_proj.weight"
    fused = torch.cat([tensors[name.format(r)] for r in "qkv"])
    for role, part in zip("qkv", fused.split([32, 16, 16]), strict=True):
        tensors[name.format(role)] = part
    o = name.format("o")
    tensors[o] = torch.nn.Parameter(tensors[o].t().contiguous().t())
    more = {"mask": torch.ones(4, 4, dtype=torch.bool), "steps": torch.tensor(7), "none": torch.empty(0, 3)}
    model = pickled(base, tmp_path / "model", more=tensors | more)
    (tmp_path / "recipe.yml").write_text(f"merge_method: passthrough\nmodels: [{{model: {model}}}]\n")
    run("merge", tmp_path / "recipe.yml", tmp_path / "out", "--allow-pickle")
    written = weights(tmp_path / "out")
    assert written.keys() == tensors.keys() | more.keys()
    assert all(torch.equal(written[n], t) for n, t in (tensors | more).items())


class Evil:
    """Unpickling it would run a command, or call any function."""

    def __init__(self, call, *arguments):
        self.call = call, arguments

    def __reduce__(self):
        return self.call


def _torch(path: Path, value: object, zipped: bool) -> None:
    torch.save({"a": value, "model.norm.weight": torch.ones(8)}, path, _use_new_zipfile_serialization=zipped)


@pytest.mark.parametrize("save", [
    lambda path, value: _torch(path, value, True),
    lambda path, value: _torch(path, value, False),
    lambda path, value: path.write_bytes(pickle.dumps({"a": value})),
    lambda path, value: path.write_bytes(pickle.dumps({"a": value}, protocol=0)),
], ids=["zip", "older", "protocol 0", "text"])  # fmt: skip
def test_a_malicious_pickle_does_not_run(run, base, tmp_path, save):
    model = pickled(base, tmp_path / "model")
    marker = tmp_path / "marker"
    for call in ((os.system, f"touch {marker}"), (eval, f"open({str(marker)!r}, 'w')"), (Path.touch, marker),
                 (subprocess.check_call, ["touch", str(marker)]), (exec, f"open({str(marker)!r}, 'w')")):  # fmt: skip
        save(model / "pytorch_model.bin", Evil(*call))
        for options in ((), ("--allow-pickle",)):
            done = run("upscale", model, tmp_path / "out", *options, expect=2)
            assert not marker.exists()
    assert "pytorch_model.bin: the pickle is refused" in done.err and "weights_only=True" in done.err
    command = [sys.executable, "-c", "import pickle, sys; pickle.load(open(sys.argv[1], 'rb'))"]
    (tmp_path / "proof").write_bytes(pickle.dumps(Evil(os.system, f"touch {marker}")))
    subprocess.run([*command, str(tmp_path / "proof")], check=True)
    assert marker.exists()  # it would have run


@pytest.mark.parametrize(("state", "message"), [
    ([torch.ones(2)], "not a mapping from names to tensors"),
    ({"a": {"b": torch.ones(2)}}, "'a' is a dict"),
    ({"a": 3}, "'a' is a int"),
    ({3: torch.ones(2)}, "the name of a tensor is not text"),
    ({"a\x1b": torch.ones(2)}, "control characters"),
    ({"a": torch.ones(2, dtype=torch.complex64)}, "'a' is of torch.complex64"),
    ({"a": torch.ones(2, 2).to_sparse()}, "'a' is of torch.float32, torch.sparse_coo"),
    ({"a": torch.ones(2, device="meta")}, "on meta"),
    ({"a": torch.ones(1).expand(10**9, 10**6)}, "claims the shape [1000000000, 1000000], more than the file stores"),
    (None, "not a mapping from names to tensors"),
])  # fmt: skip
def test_what_is_no_state_dict_is_refused(base, tmp_path, state, message):
    model = pickled(base, tmp_path / "model")
    torch.save(state, model / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="pytorch_model.bin") as caught:
        PickledCheckpoint.open(model)
    assert message in str(caught.value)


def test_damaged_and_compressed_archives_are_refused(base, tmp_path):
    model = pickled(base, tmp_path / "model")
    path = model / "pytorch_model.bin"
    raw = path.read_bytes()
    two_disks = raw[:-22] + b"PK\6\7" + struct.pack("<LQL", 0, 0, 2) + raw[-22:]
    halves = raw[:100], raw[: len(raw) // 2], raw[100:]
    for damaged in (b"", *halves, two_disks, b"PK\3\4" + bytes(100), os.urandom(1000)):
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match="refused"):
            PickledCheckpoint.open(model)
    path.write_bytes(raw)
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(tmp_path / "new", "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    shutil.move(tmp_path / "new", path)
    with pytest.raises(CheckpointError, match="the archive is compressed"):
        PickledCheckpoint.open(model)


@pytest.mark.parametrize(("damage", "message"), [
    (lambda f: (f / "pytorch_model-00002-of-00002.bin").unlink(), "00002.bin: the file is missing"),
    (lambda f: _index(f, lambda m: m.update(x="pytorch_model-00001-of-00002.bin")), "promises tensor 'x'"),
    (lambda f: _index(f, lambda m: m.update(x="../x.bin")), "an entry is outside of the folder"),
    (lambda f: _index(f, lambda m: m.update(x="x.safetensors")), "an entry is not a file of weights"),
    (lambda f: (f / "pytorch_model.bin.index.json").unlink(), "several pickled files and no index"),
    (lambda f: [p.unlink() for p in f.glob("pytorch*")], "no weights"),
    (lambda f: ((f / "pytorch_model-00001-of-00002.bin").unlink(), os.mkfifo(f / "pytorch_model-00001-of-00002.bin")),
     "not a regular file"),
])  # fmt: skip
def test_bad_folders(base, tmp_path, damage, message):
    model = pickled(base, tmp_path / "model", shards=2)
    damage(model)
    with pytest.raises(CheckpointError) as caught:
        PickledCheckpoint.open(model)
    assert message in str(caught.value)


def _index(folder: Path, change) -> None:
    path = folder / "pytorch_model.bin.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


def test_one_file_of_any_name_among_the_files_of_trainers(base, tmp_path):
    model = pickled(base, tmp_path / "model")
    (model / "pytorch_model.bin").rename(model / "weights.pt")
    for name in ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state_0.pth"):
        (model / name).write_bytes(b"not looked at")
    assert PickledCheckpoint.open(model).files == (model / "weights.pt",)


def test_reads_are_private_and_a_changed_file_is_noticed(base, tmp_path):
    for zipped in (True, False):
        model = pickled(base, tmp_path / f"model-{zipped}", zipped=zipped)
        name, checkpoint = "model.norm.weight", PickledCheckpoint.open(model)
        first = checkpoint.read(name)
        rows = checkpoint.slice("lm_head.weight", 3, 9)
        assert torch.equal(rows, load_file(base / "model.safetensors")["lm_head.weight"][3:9])
        first.zero_()
        rows.zero_()
        assert checkpoint.read(name).abs().sum() > 0
        assert checkpoint.slice("lm_head.weight", 3, 9).abs().sum() > 0
        assert first.abs().sum() == 0
        with pytest.raises(CheckpointError, match="does not have these rows"):
            checkpoint.slice(name, 3, 99)
        os.truncate(model / "pytorch_model.bin", 1000)
        with pytest.raises(CheckpointError, match="has changed since"):
            checkpoint.read(name)


_MEMORY = """
import sys, torch
from deus_merge import api
torch.set_num_threads(1)
rss = lambda: int(next(l for l in open("/proc/self/status") if l.startswith("RssAnon")).split()[1]) << 10
import deus_merge.run.executor
before, peak = rss(), 0
def look(block, resumed):
    global peak
    peak = max(peak, rss())
plan = api.plan(sys.argv[1], load_options=api.LoadOptions(allow_pickle=True))
api.merge(plan, sys.argv[2], api.RunOptions(verify=False), on_block=look)
print(peak - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
@pytest.mark.parametrize(("zipped", "bound"), [(True, 0.5), (False, 1.5)])
def test_memory_does_not_grow_with_the_model(tmp_path, zipped, bound):
    """Mapped archives take a block's working memory; older files one file more, of the four."""
    base = make_model(tmp_path / "base", layers=8, hidden_size=512, intermediate_size=1024, num_attention_heads=8)
    model = pickled(base, tmp_path / "model", shards=4, zipped=zipped)
    shard = sum(p.stat().st_size for p in model.glob("*.bin")) / 4
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(f"merge_method: passthrough\ndtype: bfloat16\nmodels: [{{model: {model}}}]\n")
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", _MEMORY, str(recipe), str(tmp_path / "out")]
    environment = os.environ | {"PYTHONPATH": str(root), "MALLOC_TRIM_THRESHOLD_": "0"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 60_000_000 + bound * shard, (int(done.stdout), shard)


def test_plans_count_what_loading_a_file_takes(run, base, tmp_path):
    """A mapped archive takes nothing; an older file is in memory while its tensors are read."""
    need = {}
    for zipped in (True, False):
        model = pickled(base, tmp_path / f"model-{zipped}", zipped=zipped)
        recipe = tmp_path / f"{zipped}.yml"
        recipe.write_text(RECIPE.format(model=model, dtype="bfloat16"))
        need[zipped] = run("plan", recipe, "--allow-pickle", "--json").json()["peak_memory_bytes"]
    size = (tmp_path / "model-False/pytorch_model.bin").stat().st_size
    assert 0 < need[False] - need[True] - size < size


def test_the_api_takes_pickles_with_leave(base, tmp_path):
    model = pickled(base, tmp_path / "model")
    recipe = api.upscale_recipe(model, preset="copy_next")
    with pytest.raises(CheckpointError):
        api.plan(recipe)
    result = api.merge(recipe, tmp_path / "out", load_options=api.LoadOptions(allow_pickle=True))
    assert result.verification.passed and result.plan.function_preserving
