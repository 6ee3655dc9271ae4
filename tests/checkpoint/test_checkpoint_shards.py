"""What is written at known offsets is what safetensors reads back, however the bytes got there."""

from __future__ import annotations

import ctypes
import errno
import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from checkpoint_files import random_tensors, write_model
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from deus_merge.checkpoint import Checkpoint, ShardWriter, TensorEntry, free_space, plan_shards, system
from deus_merge.checkpoint.system import disk_errors, write_all
from deus_merge.core.errors import CheckpointError, MachineError, PlanError
from deus_merge.core.units import BITS, ITEMSIZE, torch_dtype


def loaded(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}


def entries_of(checkpoint: Checkpoint) -> list[TensorEntry]:
    return [TensorEntry(t.name, t.dtype, t.shape) for t in checkpoint.tensors.values()]


@pytest.fixture
def writer(tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    opened = []

    def make(entries, limit=10**6, **options):
        opened.append(ShardWriter(folder, plan_shards([[e] for e in entries], limit), **options))
        return opened[-1]

    yield make
    for each in opened:
        each.close()


@pytest.mark.parametrize("dtype", sorted(code for code, bits in BITS.items() if bits % 8 == 0))
def test_every_dtype_comes_back(dtype, writer):
    tensor = torch.arange(12).reshape(3, 4).to(torch_dtype(dtype))
    one = writer([TensorEntry("t", dtype, (4, 3)), TensorEntry("s", dtype, ()), TensorEntry("e", dtype, (0, 2))])
    one.write_tensor("t", tensor.T)  # not contiguous
    one.write_tensor("s", tensor[0, 1])
    one.write_tensor("e", torch.empty(0, 2, dtype=tensor.dtype))
    back = loaded(one.folder)
    assert back["t"].dtype == tensor.dtype
    assert back["t"].view(torch.uint8).tolist() == tensor.T.contiguous().view(torch.uint8).tolist()
    assert back["s"].reshape(1).view(torch.uint8).tolist() == tensor[0, 1].reshape(1).view(torch.uint8).tolist()
    assert one.bytes_written == 13 * ITEMSIZE[dtype]


def test_parts_and_zeros(writer):
    one = writer([TensorEntry(n, "U8", (7,)) for n in "abc"])
    one.write("a", bytes(range(7)))
    one.write("b", b"345", at=4)
    one.write("b", memoryview(b"0123"), at=0)
    one.zeros("c")
    one.zeros("a")  # had been written to: really overwritten
    back = loaded(one.folder)
    assert back["a"].tolist() == [0] * 7 == back["c"].tolist()
    assert bytes(back["b"].tolist()) == b"0123345"


def test_zeros_of_a_resumed_file_overwrite(writer):
    entries = [TensorEntry("a", "F32", (600_000,))]
    writer(entries, 10**8).write_tensor("a", torch.ones(600_000))
    writer(entries, 10**8, resume=True).zeros("a")
    assert not loaded(writer(entries, 10**8, resume=True).folder)["a"].any()


@pytest.mark.parametrize("wrong", ["short", "long", "behind", "dtype", "shape", "source"])
def test_what_does_not_fit_is_a_bug(wrong, writer, model):
    one = writer([TensorEntry("a", "F32", (2, 3))])
    calls = {
        "short": lambda: one.write("a", bytes(23)),
        "long": lambda: one.write("a", bytes(25)),
        "behind": lambda: one.write("a", bytes(4), at=21),
        "dtype": lambda: one.write_tensor("a", torch.ones(2, 3, dtype=torch.int32)),
        "shape": lambda: one.write_tensor("a", torch.ones(3, 2)),
        "source": lambda: one.copy("a", Checkpoint.open(model)["model.embed_tokens.weight"]),
    }
    with pytest.raises(ValueError, match="a: "):
        calls[wrong]()
    assert one.bytes_written == 0


def _refuse(code):
    def call(*_):
        raise OSError(code, os.strerror(code))

    return call


KERNEL = os.copy_file_range
WAYS = {
    "kernel": KERNEL,
    "in small parts": lambda s, d, n, so, do: KERNEL(s, d, min(n, 5), so, do),
    "other device": _refuse(errno.EXDEV),
    "unknown call": _refuse(errno.ENOSYS),
    "unsupported": _refuse(errno.EOPNOTSUPP),
    "says zero": lambda *_: 0,
    "absent": None,
}


@pytest.mark.parametrize("way", WAYS)
def test_copies_file_to_file(way, writer, model, tensors, monkeypatch):
    if WAYS[way] is None:
        monkeypatch.delattr(os, "copy_file_range")
    else:
        monkeypatch.setattr(os, "copy_file_range", WAYS[way])
    before = {p: p.read_bytes() for p in model.iterdir()}
    with Checkpoint.open(model) as checkpoint:
        one = writer(entries_of(checkpoint), 200)
        one.copy_many(checkpoint.tensors.items())
    back = loaded(one.folder)
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in tensors.items())
    assert {p: p.read_bytes() for p in model.iterdir()} == before  # the sources are never touched


def test_copies_between_file_systems(model, tensors, tmp_path):
    if not os.path.isdir("/dev/shm") or os.stat("/dev/shm").st_dev == os.stat(tmp_path).st_dev:
        pytest.skip("no second file system")
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name, Checkpoint.open(model) as checkpoint:
        one = ShardWriter(Path(name), plan_shards([entries_of(checkpoint)], 10**6))
        one.copy_many(checkpoint.tensors.items())
        one.close()
        assert all(torch.equal(t, tensors[n]) for n, t in loaded(Path(name)).items())


def test_a_whole_file_is_one_copy(writer, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(os, "copy_file_range", lambda *a: calls.append(a) or KERNEL(*a))
    source = write_model(tmp_path / "m", {f"t{i}": torch.full((9,), float(i)) for i in range(20)})
    with Checkpoint.open(source) as checkpoint:
        one = writer(entries_of(checkpoint))
        one.copy_many(reversed(checkpoint.tensors.items()))
    assert len(calls) == 1
    assert loaded(one.folder)["t7"].tolist() == [7.0] * 9


@settings(deadline=None)
@given(st.data())
def test_copy_law(tmp_path_factory, data):
    """Any choice, order and renaming of tensors, from one or several shards into any shards."""
    root = tmp_path_factory.mktemp("law")
    tensors = random_tensors(1)
    source = write_model(root / "m", tensors, data.draw(st.integers(1, 4)))
    chosen = data.draw(st.lists(st.sampled_from(sorted(tensors)), min_size=1, max_size=10))
    pairs = [(f"new.{i}", name) for i, name in enumerate(chosen)]
    with Checkpoint.open(source) as checkpoint:
        entries = [TensorEntry(new, checkpoint[old].dtype, checkpoint[old].shape) for new, old in pairs]
        (root / "out").mkdir()
        one = ShardWriter(root / "out", plan_shards([[e] for e in entries], data.draw(st.integers(1, 2000))))
        one.copy_many([(new, checkpoint[old]) for new, old in data.draw(st.permutations(pairs))])
        one.close()
    back = loaded(root / "out")
    assert all(torch.equal(back[new], tensors[old]) for new, old in pairs)


def test_any_order_from_any_thread(writer):
    entries = [TensorEntry(f"t{i}", "U8", (3000 + i,)) for i in range(64)]
    one = writer(entries, 20_000)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: one.write(f"t{i}", bytes([i]) * (3000 + i)), reversed(range(64))))
    assert all(set(t.tolist()) == {int(n[1:])} for n, t in loaded(one.folder).items())
    assert one.bytes_written == sum(e.nbytes for e in entries)
    assert one.take_dirty() == {p.name for p in one.folder.iterdir()}
    assert one.take_dirty() == frozenset()


def test_source_that_shrank(writer, model):
    checkpoint = Checkpoint.open(model)
    info = checkpoint["model.embed_tokens.weight"]
    one = writer([TensorEntry(info.name, info.dtype, info.shape)])
    os.truncate(info.file, info.offset + 10)
    with pytest.raises(CheckpointError, match="ends early") as caught:
        one.copy(info.name, info)
    assert caught.value.where == info.file


def test_no_space_is_reported_before_anything_is_written(writer, tmp_path):
    with pytest.raises(PlanError, match="no space for the output"):
        writer([TensorEntry("a", "U8", (2**50,))], 2**60)
    assert list((tmp_path / "out").iterdir()) == []
    with open("/dev/full", "wb") as full, pytest.raises(MachineError, match="no space left"), disk_errors(tmp_path):
        write_all(full.fileno(), memoryview(b"x"), 0)
    assert 0 < free_space(tmp_path / "not" / "yet" / "there") < 2**50


@pytest.mark.parametrize("answer", [0, errno.EOPNOTSUPP, errno.ENOSPC, None])
def test_room_is_reserved_where_the_file_system_can(answer, writer, monkeypatch):
    """A full disk shows when the files are created."""
    reserved = []

    def fallocate(fd, mode, offset, length):
        reserved.append((os.path.basename(os.readlink(f"/proc/self/fd/{fd}")), mode, offset.value, length.value))
        ctypes.set_errno(answer)
        return -1 if answer else 0

    functions = {"fallocate": fallocate} if answer is not None else {}  # not every C library has it
    monkeypatch.setattr(system, "libc_function", functions.get)
    if answer == errno.ENOSPC:
        with pytest.raises(MachineError, match="no space left"):
            writer([TensorEntry("a", "U8", (1000,))])
        return
    one = writer([TensorEntry("a", "U8", (1000,))])
    size = (one.folder / "model.safetensors").stat().st_size
    assert reserved == ([("model.safetensors", 0, 0, size)] if answer is not None else [])
    assert not loaded(one.folder)["a"].any()


@pytest.mark.parametrize("mask", [0o022, 0o027])
def test_files_get_the_users_umask(mask, writer):
    old = os.umask(mask)
    try:
        one = writer([TensorEntry("a", "U8", (1,))])
    finally:
        os.umask(old)
    assert (one.folder / "model.safetensors").stat().st_mode & 0o777 == 0o666 & ~mask
