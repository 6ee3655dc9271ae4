"""A source pickles: the copy reads the same tensors, opens its files when it needs them, and notices changed files."""

from __future__ import annotations

import os
import pickle
import shutil
import subprocess
import sys

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from support import make_model

from deus_merge.checkpoint import Checkpoint
from deus_merge.checkpoint.lora import LoraSource
from deus_merge.checkpoint.pickled import PickledCheckpoint
from deus_merge.core.errors import CheckpointError

KINDS = ["safetensors", "pickled", "pickled, older format", "adapter", "adapter of a pickled model", "untied head"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A model, the same one pickled in both formats, and two adapters, one of which unties the head."""
    root = tmp_path_factory.mktemp("models")
    make_model(root / "base", layers=2, tied=True, max_shard_size="40KB")
    for name, zipped in (("zip", True), ("older", False)):
        (root / name).mkdir()
        (root / name / "config.json").write_bytes((root / "base/config.json").read_bytes())
        tensors = {n: t for file in (root / "base").glob("*.safetensors") for n, t in load_file(file).items()}
        torch.save(tensors, root / name / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    for name, saved in (("adapter", None), ("head", ["lm_head"])):
        config = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], modules_to_save=saved)
        model = peft.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(root / "base"), config)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn(parameter.shape, generator=generator))
        model.save_pretrained(root / name)
    return root


@pytest.fixture
def source(request, folders):
    kind = request.param
    if kind == "safetensors":
        return Checkpoint.open(folders / "base")
    if kind.startswith("pickled"):
        return PickledCheckpoint.open(folders / ("older" if "older" in kind else "zip"))
    base = PickledCheckpoint.open(folders / "zip") if "pickled" in kind else Checkpoint.open(folders / "base")
    return LoraSource(base, folders / ("head" if "head" in kind else "adapter"))


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("source", KINDS, indirect=True)
@pytest.mark.parametrize("used", [False, True])
def test_a_copy_reads_the_same(source, used):
    unused = len(pickle.dumps(source))
    expected = {name: source.read(name) for name in source.tensors} if used else {}
    if used:
        source.slice(next(n for n in source.tensors if "q_proj" in n), 0, 1)  # leaves something in a cache
        source.prefetch(source.tensors)
    before = descriptors()
    data = pickle.dumps(source)
    copy = pickle.loads(data)
    assert descriptors() == before  # nothing is opened yet
    expected = expected or {name: source.read(name) for name in source.tensors}
    assert len(data) <= unused < 50_000  # no weights travel
    assert type(copy) is type(source)
    for name in ("config", "fingerprint", "files", "folders", "tensors", "provenance", "where"):
        assert getattr(copy, name) == getattr(source, name), name
    assert list(copy.tensors) == list(source.tensors)
    with pytest.raises(TypeError):
        copy.tensors["more"] = None
    for name, tensor in expected.items():
        assert torch.equal(copy.read(name), tensor)
        assert copy.workspace(name) == source.workspace(name)
        assert copy.root(name)[1] == source.root(name)[1]
        if tensor.dim() == 2:
            assert torch.equal(copy.slice(name, 1, 3), tensor[1:3])
    copy.prefetch(copy.tensors)
    assert pickle.loads(pickle.dumps(copy)).fingerprint == source.fingerprint


@pytest.mark.parametrize("source", KINDS, indirect=True)
def test_a_copy_notices_a_changed_file(source):
    data = pickle.dumps(source)
    for file in source.files:
        if file.suffix == ".json":  # an adapter's settings have been read already
            continue
        status = os.stat(file)
        os.utime(file, ns=(0, 0))
        try:
            copy = pickle.loads(data)
            with pytest.raises(CheckpointError, match="has changed since") as caught:
                for name in copy.tensors:
                    copy.read(name)
            assert caught.value.where == file
        finally:
            os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert all(pickle.loads(data).read(name).isfinite().all() for name in source.tensors)


def test_sources_of_one_model_stay_one(folders):
    base = Checkpoint.open(folders / "base")
    one, two = pickle.loads(pickle.dumps((base, LoraSource(base, folders / "adapter"))))
    assert two.base is one


def test_a_closed_checkpoint_opens_again(folders):
    with Checkpoint.open(folders / "base") as checkpoint:
        tensor = checkpoint.read("model.norm.weight")
    assert torch.equal(pickle.loads(pickle.dumps(checkpoint)).read("model.norm.weight"), tensor)


def test_in_another_process(folders):
    source = Checkpoint.open(folders / "base")
    name = "model.layers.0.self_attn.q_proj.weight"
    code = f"import pickle, sys; print(pickle.load(sys.stdin.buffer).read({name!r}).double().sum().item())"
    done = subprocess.run([sys.executable, "-c", code], input=pickle.dumps(source), capture_output=True, check=True)
    assert float(done.stdout) == source.read(name).double().sum().item()


def test_files_of_another_machine_have_other_inodes(folders, tmp_path):
    """A pickled source compares size and time alone; this process would notice that a file was replaced."""
    shutil.copytree(folders / "base", tmp_path / "model")
    source = Checkpoint.open(tmp_path / "model")
    data, name = pickle.dumps(source), "model.norm.weight"
    (tmp_path / "model").rename(tmp_path / "before")
    shutil.copytree(tmp_path / "before", tmp_path / "model")  # the same bytes and times
    assert torch.equal(pickle.loads(data).read(name), Checkpoint.open(tmp_path / "before").read(name))
    with pytest.raises(CheckpointError, match="has changed since"):
        source.read(name)
