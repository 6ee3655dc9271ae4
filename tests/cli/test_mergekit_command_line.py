"""mergekit's command lines run with the program's name exchanged; options without a meaning here are reported."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from support import make_model, save_tokenizer, train_tokenizer


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("mergekit")
    base = make_model(root / "base", layers=2)
    save_tokenizer(base, train_tokenizer())
    (root / "recipe.yml").write_text(f"merge_method: passthrough\nmodels: [{{model: {base}}}]\n")
    return root


EVERYTHING = (
    "--allow-crimes", "--transformers-cache", "CACHE", "--lora-merge-cache", "CACHE", "--lora-merge-dtype", "float32",
    "--device", "cpu", "--cuda", "--low-cpu-memory", "--out-shard-size", "5B", "--copy-tokenizer", "--clone-tensors",
    "--trust-remote-code", "--random-seed", "7", "--lazy-unpickle", "--write-model-card", "--safe-serialization", "-vv",
    "--read-to-gpu", "--multi-gpu", "--num-threads", "1", "--gpu-rich", "--async-write", "--write-threads", "2",
    "--no-unsafe-truncate-embeddings",
)  # fmt: skip
NOTHING = (
    "--no-allow-crimes", "--no-cuda", "--no-low-cpu-memory", "--no-clone-tensors", "--no-trust-remote-code", "-j", "1",
    "--no-quiet", "--no-lazy-unpickle", "--no-read-to-gpu", "--no-multi-gpu", "--no-async-write",
    "--safe-serialization", "--no-unsafe-truncate-embeddings",
)  # fmt: skip


def test_every_option_is_taken(run, place, tmp_path):
    options = [str(tmp_path) if o == "CACHE" else o for o in EVERYTHING]
    stderr = run("merge", place / "recipe.yml", tmp_path / "out", *options).err
    idle = re.findall(r"^note: (\S+) changes nothing: .+$", stderr, re.MULTILINE)
    assert sorted(idle) == [
        "--allow-crimes", "--async-write", "--clone-tensors", "--lazy-unpickle", "--lora-merge-cache",
        "--lora-merge-dtype", "--low-cpu-memory", "--multi-gpu", "--read-to-gpu", "--trust-remote-code",
        "--write-threads",
    ]  # fmt: skip
    manifest = json.loads((tmp_path / "out/deus_merge.json").read_text())
    assert (tmp_path / "out/README.md").exists() and (tmp_path / "out/tokenizer_config.json").exists()
    stderr = run("merge", place / "recipe.yml", tmp_path / "again", *NOTHING).err
    assert "note:" not in stderr
    assert run("merge", place / "recipe.yml", tmp_path / "quiet", *options, "--quiet").err == ""
    assert manifest["plan_hash"] == json.loads((tmp_path / "quiet/deus_merge.json").read_text())["plan_hash"]


def test_every_option_of_the_installed_mergekit_is_known(run, pytestconfig):
    """If mergekit is installed (make oracle), every option in its own list is known."""
    found = list((pytestconfig.rootpath / ".venv-oracle").glob("lib/python*/site-packages/mergekit/options.py"))
    if not found:
        pytest.skip("no mergekit here: make oracle")
    fields = re.findall(r"^    (\w+): \w.* = ", found[0].read_text(), re.MULTILINE)
    ours = EVERYTHING + NOTHING + ("--quiet", "-v")
    assert len(fields) > 20
    unknown = [f for f in fields if f != "verbosity" and f.replace("_", "-") not in " ".join(ours)]
    assert not unknown


def test_what_asks_for_another_result_is_honoured(run, place, tmp_path):
    run("merge", place / "recipe.yml", tmp_path / "out", "--no-copy-tokenizer", "--no-write-model-card")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "config.json", "deus_merge.json", "deus_merge.original.yml", "deus_merge.yml", "generation_config.json",
        "model.safetensors",
    ]  # fmt: skip
    run("verify", tmp_path / "out")
    text = (place / "recipe.yml").read_text() + "tokenizer_source: base\n"
    (tmp_path / "asks.yml").write_text(text)
    run("merge", tmp_path / "asks.yml", tmp_path / "asked", "--no-copy-tokenizer")
    assert (tmp_path / "asked/tokenizer_config.json").exists()  # as in mergekit: the recipe asked for it


@pytest.mark.parametrize(
    ("size", "files"), [("5B", 1), ("100M", 1), ("50K", 2), ("50000", 2), ("50kB", 2), ("0", 1), ("-1", 1)]
)
def test_sizes_of_shards_mean_what_they_mean_there(run, place, tmp_path, size, files):
    run("merge", place / "recipe.yml", tmp_path / "out", "--out-shard-size", size)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == files


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_devices(run, place, tmp_path):
    (tmp_path / "recipe.yml").write_text((place / "recipe.yml").read_text() + "dtype: bfloat16\n")
    for options in (("--cuda",), ("--gpu-rich",), ("--device", "cuda", "--no-cuda")):
        assert (
            "torch finds no CUDA device"
            in run("merge", tmp_path / "recipe.yml", tmp_path / "x", *options, expect=2).err
        )
    run("merge", tmp_path / "recipe.yml", tmp_path / "cpu", "--device", "cpu", "--cuda")
    run("merge", tmp_path / "recipe.yml", tmp_path / "auto")


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--no-safe-serialization", "only safetensors files are written"),
        ("--unsafe-truncate-embeddings", "it drops tokens silently"),
        ("--out-shard-size=many", "'many' is not a size: expected bytes, or a number with K, M or B"),
        ("--out-shard-size=-many", "'-many' is not a size"),
        ("--no-such-option", "no such option --no-such-option"),
    ],
)
def test_what_cannot_be_is_refused(run, place, tmp_path, option, message):
    assert message in run("merge", place / "recipe.yml", tmp_path / "out", option, expect=2).err
    assert not (tmp_path / "out").exists()


def test_a_cache_of_ones_own(run, place, tmp_path):
    """Models of the hub are looked for in the folder that is named."""
    cache = tmp_path / "cache"
    snapshot = cache / "models--org--name/snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    for file in (place / "base").iterdir():
        (snapshot / file.name).write_bytes(file.read_bytes())
    (cache / "models--org--name/refs").mkdir()
    (cache / "models--org--name/refs/main").write_text("a" * 40)
    (tmp_path / "recipe.yml").write_text("merge_method: passthrough\nmodels: [{model: org/name}]\n")
    assert "not in the hub's cache" in run("merge", tmp_path / "recipe.yml", tmp_path / "out", expect=2).err
    run("merge", tmp_path / "recipe.yml", tmp_path / "out", "--transformers-cache", cache)
