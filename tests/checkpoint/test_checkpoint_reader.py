"""Checkpoints open lazily, read stored tensors, and refuse inconsistent folders."""

from __future__ import annotations

import gc
import json
import os
import shutil

import pytest
import torch
from checkpoint_files import random_tensors, raw_file, write_model
from safetensors.torch import load_file, save, save_file

from deus_merge.checkpoint import Checkpoint
from deus_merge.core.errors import CheckpointError

INDEX = "model.safetensors.index.json"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


@pytest.mark.parametrize("shards", [1, 2, 3])
def test_reads_what_was_saved(shards, tmp_path, tensors):
    folder = write_model(tmp_path / "m", tensors, shards)
    with Checkpoint.open(folder) as checkpoint:
        assert set(checkpoint.tensors) == set(tensors)
        assert len(checkpoint.files) == shards
        assert checkpoint.config["model_type"] == "llama"
        assert checkpoint.metadata == {"format": "pt"}
        checkpoint.prefetch(tensors)
        for name, tensor in tensors.items():
            read = checkpoint.read(name)
            assert read.dtype == tensor.dtype
            assert torch.equal(read, tensor)


def test_slices_are_rows(model, tensors):
    checkpoint = Checkpoint.open(model)
    name = "model.embed_tokens.weight"
    for start, stop in [(0, 32), (3, 7), (31, 32), (5, 5)]:
        assert torch.equal(checkpoint.slice(name, start, stop), tensors[name][start:stop])
    assert checkpoint.slice("model.none", 0, 0).shape == (0, 4)
    for bad in [(-1, 3), (3, 33), (5, 4)]:
        with pytest.raises(CheckpointError, match="does not have these rows"):
            checkpoint.slice(name, *bad)
    with pytest.raises(CheckpointError, match="does not have these rows"):
        checkpoint.slice("model.scale", 0, 1)


def test_writing_to_a_tensor_reaches_neither_file_nor_later_reads(model, tensors):
    files = {p: p.read_bytes() for p in model.iterdir()}
    checkpoint = Checkpoint.open(model)
    for name, tensor in tensors.items():
        checkpoint.read(name).zero_()
        assert torch.equal(checkpoint.read(name), tensor)
    assert {p: p.read_bytes() for p in model.iterdir()} == files


def test_tensor_outlives_the_checkpoint_and_nothing_leaks(model, tensors):
    def descriptors():
        gc.collect()
        return len(os.listdir("/proc/self/fd"))

    before = descriptors()
    with Checkpoint.open(model) as checkpoint:
        read = {name: checkpoint.read(name) for name in tensors}
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())
    read.clear()
    assert descriptors() == before
    Checkpoint.open(model).read("model.scale")  # not closed, but dropped
    assert descriptors() == before
    with pytest.raises(CheckpointError, match="closed"):
        checkpoint.read("model.scale")


def test_reading_takes_no_anonymous_memory(tmp_path):
    size = 64 << 20
    write_model(tmp_path / "m", {"w": torch.zeros(size, dtype=torch.uint8)})

    def anonymous():
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))

    with Checkpoint.open(tmp_path / "m") as checkpoint:
        before = anonymous()
        tensor = checkpoint.read("w")
        assert int(tensor.view(torch.int64).sum()) == 0
        assert anonymous() - before < size // 4


def test_unaligned_foreign_file(tmp_path):
    header = {
        "a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
        "b": {"dtype": "F32", "shape": [2], "data_offsets": [1, 9]},
    }
    write_model(tmp_path, {})
    data = torch.tensor([1.5, -2.0])
    (tmp_path / "model.safetensors").write_bytes(raw_file(header, b"\7" + data.numpy().tobytes()))
    assert torch.equal(Checkpoint.open(tmp_path).read("b"), data)


def test_unknown_tensor_names_the_nearest(model):
    with pytest.raises(CheckpointError, match="did you mean 'model.layers.0.q.weight'"):
        Checkpoint.open(model).read("model.layers.0.q.weigth")


@pytest.mark.parametrize("change", ["shorter", "rewritten", "replaced"])
def test_a_file_that_changes_is_noticed(change, model):
    checkpoint = Checkpoint.open(model)
    path = model / FIRST
    if change == "shorter":
        os.truncate(path, 100)
    elif change == "rewritten":
        path.write_bytes(path.read_bytes())
        os.utime(path, ns=(0, 0))
    else:
        shutil.copy(path, model / "new")
        os.replace(model / "new", path)
    with pytest.raises(CheckpointError, match="has changed"):
        checkpoint.read("model.embed_tokens.weight")


def test_single_file_of_another_name_and_links_of_a_cache(tmp_path, tensors):
    blobs, folder = tmp_path / "blobs", tmp_path / "snapshot"
    blobs.mkdir(), folder.mkdir()
    save_file(tensors, blobs / "aa")
    (blobs / "bb").write_text("{}")
    (folder / "weights.safetensors").symlink_to("../blobs/aa")
    (folder / "config.json").symlink_to("../blobs/bb")
    assert torch.equal(Checkpoint.open(folder).read("model.scale"), tensors["model.scale"])


def test_fingerprint_follows_layout_not_time_or_place(tmp_path, tensors):
    first = write_model(tmp_path / "a", tensors, 2)
    second = write_model(tmp_path / "b", tensors, 2)
    os.utime(second / FIRST, ns=(0, 0))
    prints = [Checkpoint.open(first).fingerprint, Checkpoint.open(second).fingerprint]
    assert prints[0] == prints[1]
    prints.append(Checkpoint.open(write_model(tmp_path / "c", tensors, 3)).fingerprint)
    (second / "config.json").write_text("{}")
    prints.append(Checkpoint.open(second).fingerprint)
    renamed = {"other": torch.ones(2)} | random_tensors()
    prints.append(Checkpoint.open(write_model(tmp_path / "d", renamed, 2)).fingerprint)
    assert len(set(prints)) == 4
    assert all(len(p) == 64 for p in prints)


def _index(change):
    def apply(folder):
        index = json.loads((folder / INDEX).read_text())
        result = change(index)
        (folder / INDEX).write_text(json.dumps(index if result is None else result))

    return apply


def _points_to(file):
    return _index(lambda index: index["weight_map"].update({"model.scale": file}))


# name: (the change to a valid folder of two shards, a part of the message, the file it names)
BAD = {
    "no config": (lambda f: (f / "config.json").unlink(), "missing", "config.json"),
    "config a list": (lambda f: (f / "config.json").write_text("[]"), "not a JSON object", "config.json"),
    "config with NaN": (lambda f: (f / "config.json").write_text('{"a": NaN}'), "strict JSON", "config.json"),
    "config with a key twice": (
        lambda f: (f / "config.json").write_text('{"a":1,"a":1}'),
        "duplicate key 'a'",
        "config.json",
    ),
    "config not UTF-8": (lambda f: (f / "config.json").write_bytes(b'{"a":"\xff"}'), "strict JSON", "config.json"),
    "config a fifo": (
        lambda f: ((f / "config.json").unlink(), os.mkfifo(f / "config.json")),
        "regular",
        "config.json",
    ),
    "index a list": (_index(lambda _: []), "not a JSON object", INDEX),
    "index without map": (_index(lambda i: i.pop("weight_map") and None), "no weight_map", INDEX),
    "index with empty map": (_index(lambda i: i["weight_map"].clear()), "no weight_map", INDEX),
    "index to a number": (_points_to(3), "not a file of weights", INDEX),
    "index a folder": (lambda f: ((f / INDEX).unlink(), (f / INDEX).mkdir()), "regular", INDEX),
    "index leaves, up": (_points_to("../x.safetensors"), "outside of the folder", INDEX),
    "index leaves, middle": (_points_to("a/../../x.safetensors"), "outside of the folder", INDEX),
    "index leaves, absolute": (_points_to("/tmp/x.safetensors"), "outside of the folder", INDEX),
    "index leaves, backslash": (_points_to("..\\x.safetensors"), "outside of the folder", INDEX),
    "index leaves, drive": (_points_to("C:x.safetensors"), "outside of the folder", INDEX),
    "index to NUL": (_points_to("a\0.safetensors"), "outside of the folder", INDEX),
    "index to nothing": (_points_to(""), "outside of the folder", INDEX),
    "index to a pickle": (_points_to("x.bin"), "not a file of weights", INDEX),
    "index to a missing file": (_points_to("x.safetensors"), "missing", "x.safetensors"),
    "index to the wrong file": (
        lambda f: _points_to(FIRST if "model.scale" in load_file(f / SECOND) else SECOND)(f),
        "promises tensor 'model.scale'",
        INDEX,
    ),
    "index of a missing tensor": (
        _index(lambda i: i["weight_map"].update({"nowhere": FIRST})),
        "promises tensor 'nowhere'",
        INDEX,
    ),
    "shard missing": (lambda f: (f / SECOND).unlink(), "missing", SECOND),
    "shard cut off": (lambda f: os.truncate(f / SECOND, 60), "longer than the file", SECOND),
    "shard empty": (lambda f: os.truncate(f / SECOND, 0), "too short", SECOND),
    "name in two shards": (
        lambda f: shutil.copy(f / FIRST, f / SECOND),
        "is in two files",
        SECOND,
    ),
    "index and another single file": (
        lambda f: (f / "model.safetensors").write_bytes(save({"w": torch.ones(2)})),
        "two checkpoints",
        "",
    ),
    "shards without index": (lambda f: (f / INDEX).unlink(), "no index", ""),
    "only pickles": (
        lambda f: ([p.unlink() for p in f.glob("model*")], (f / "pytorch_model.bin").touch()),
        "--allow-pickle",
        "",
    ),
    "nothing": (lambda f: [p.unlink() for p in f.glob("model*")], "no safetensors file", ""),
    "no folder": (lambda f: shutil.rmtree(f), "no such folder", ""),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_folder_is_refused(case, model):
    damage, message, file = BAD[case]
    damage(model)
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(model)
    assert message in str(caught.value)
    assert caught.value.where == (model / file if file else model)
