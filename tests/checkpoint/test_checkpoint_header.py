"""Headers that lie are refused by the file's name; honest ones are read to the byte."""

from __future__ import annotations

import json
import os
import socket

import pytest
import torch
from checkpoint_files import raw_file
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from deus_merge.checkpoint.header import parse_json, read_header
from deus_merge.core.errors import CheckpointError

F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def one(**changes) -> dict:
    return {"x": F32 | changes}


def two(first: list[int], second: list[int]) -> dict:
    def sized(offsets):
        return {"dtype": "U8", "shape": [offsets[1] - offsets[0]], "data_offsets": offsets}

    return {"a": sized(first), "b": sized(second)}


# name: (file, a part of the message, whether the safetensors library refuses it too)
BAD = {
    "empty": (b"", "too short", True),
    "seven bytes": (b"\0" * 7, "too short", True),
    "length only": (raw_file(b""), "not JSON", True),
    "git lfs pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "a Git LFS pointer", True),
    "length 2^64-1": (raw_file(one(), b"\0" * 8, length=2**64 - 1), "too long", True),
    "length 100 MB + 1": (raw_file(one(), b"\0" * 8, length=100_000_001), "too long", True),
    "longer than the file": (raw_file(one(), b"\0" * 8, length=5000), "longer than the file", True),
    "length one too small": (raw_file(one(), b"\0" * 8, length=len(json.dumps(one())) - 1), "strict JSON", True),
    "not JSON": (raw_file(b"{nonsense}"), "strict JSON", True),
    "leading space": (raw_file(b" {}"), "not JSON", False),
    "a list": (raw_file([]), "not JSON", True),
    "not UTF-8": (raw_file(b'{"\xff": 1}'), "strict JSON", True),
    "UTF-16": (raw_file('{"a": 1}'.encode("utf-16")), "not JSON", True),
    "two objects": (raw_file(b"{}{}"), "strict JSON", True),
    "nested deeply": (raw_file(b'{"x":' + b"[" * 200_000), "nested too deeply", True),
    "huge number": (raw_file(b'{"x": ' + b"9" * 10_000 + b"}"), "strict JSON", True),
    "NaN": (raw_file(b'{"x": NaN}'), "strict JSON", True),
    "duplicate tensor": (
        raw_file(f'{{"x": {json.dumps(F32)}, "x": {json.dumps(F32)}}}', b"\0" * 8),
        "duplicate key 'x'",
        False,
    ),
    "duplicate key": (
        raw_file(b'{"x":{"dtype":"F32","dtype":"F16","shape":[2],"data_offsets":[0,8]}}', b"\0" * 8),
        "duplicate key 'dtype'",
        True,
    ),
    "metadata no object": (raw_file({"__metadata__": 3}), "__metadata__", True),
    "metadata not strings": (raw_file({"__metadata__": {"a": 3}}), "__metadata__", True),
    "entry no object": (raw_file({"x": [1]}), "malformed entry", True),
    "entry incomplete": (raw_file({"x": {"dtype": "F32", "shape": [2]}}), "malformed entry", True),
    "entry with more": (raw_file(one(file="/etc/passwd"), b"\0" * 8), "malformed entry", False),
    "unknown dtype": (raw_file(one(dtype="F33"), b"\0" * 8), "unknown dtype", True),
    "dtype in small letters": (raw_file(one(dtype="f32"), b"\0" * 8), "unknown dtype", True),
    "dtype a number": (raw_file(one(dtype=32), b"\0" * 8), "unknown dtype", True),
    "dtype a list": (raw_file(one(dtype=["F32"]), b"\0" * 8), "unknown dtype", True),
    "shape a number": (raw_file(one(shape=2), b"\0" * 8), "malformed shape", True),
    "shape negative": (raw_file(one(shape=[-2]), b"\0" * 8), "malformed shape", True),
    "shape twice negative": (raw_file(one(shape=[-2, -1]), b"\0" * 8), "malformed shape", True),
    "shape a float": (raw_file(one(shape=[2.0]), b"\0" * 8), "malformed shape", True),
    "shape a bool": (raw_file(one(shape=[True, 2]), b"\0" * 8), "malformed shape", True),
    "shape of 2^64": (raw_file(one(shape=[2**64]), b"\0" * 8), "malformed shape", True),
    "shape overflows": (raw_file(one(shape=[2**32, 2**32]), b"\0" * 8), "overflows", True),
    "shape overflows to fit": (raw_file(one(shape=[2**62 + 1, 2, 2]), b"\0" * 8), "overflows", True),
    "shape overflows to zero": (
        raw_file(one(shape=[2**40, 2**40, 0], data_offsets=[0, 0])),
        "overflows",
        True,
    ),
    "too many axes": (raw_file(one(shape=[2] + [1] * 64), b"\0" * 8), "malformed shape", False),
    "offsets one": (raw_file(one(data_offsets=[8]), b"\0" * 8), "malformed data_offsets", True),
    "offsets three": (raw_file(one(data_offsets=[0, 4, 8]), b"\0" * 8), "malformed data_offsets", True),
    "offsets negative": (raw_file(one(data_offsets=[-8, 0]), b"\0" * 8), "malformed data_offsets", True),
    "offsets floats": (raw_file(one(data_offsets=[0.0, 8.0]), b"\0" * 8), "malformed data_offsets", True),
    "offsets reversed": (raw_file(one(data_offsets=[8, 0]), b"\0" * 8), "do not fit", True),
    "offsets too small": (raw_file(one(data_offsets=[0, 4]), b"\0" * 4), "do not fit", True),
    "offsets too large": (raw_file(one(data_offsets=[0, 12]), b"\0" * 12), "do not fit", True),
    "hole in front": (raw_file(one(data_offsets=[4, 12]), b"\0" * 12), "gap after the header", True),
    "hole between": (raw_file(two([0, 4], [5, 9]), b"\0" * 9), "gap after 'a'", True),
    "overlap": (raw_file(two([0, 4], [3, 7]), b"\0" * 7), "overlaps 'a'", True),
    "same place": (raw_file(two([0, 4], [0, 4]), b"\0" * 4), "overlaps 'a'", True),
    "inside another": (raw_file(two([0, 8], [2, 4]), b"\0" * 8), "overlaps 'a'", True),
    "cut off": (raw_file(one(), b"\0" * 7), "after the end of the file", True),
    "far out of the file": (raw_file(one(data_offsets=[2**40, 2**40 + 8]), b"\0" * 8), "gap", True),
    "trailing byte": (raw_file(one(), b"\0" * 9), "bytes after the last tensor", True),
    "data without tensors": (raw_file({}, b"\0"), "bytes after", True),
    "empty name": (raw_file({"": F32}, b"\0" * 8), "name is empty", False),
    "NUL in a name": (raw_file({"a\0b": F32}, b"\0" * 8), "control characters", False),
    "escape sequence in a name": (raw_file({"\x1b[2J": F32}, b"\0" * 8), "control characters", False),
    "newline in a name": (raw_file({"a\nb": F32}, b"\0" * 8), "control characters", False),
    "lone surrogate in a name": (raw_file({"\ud800": F32}, b"\0" * 8), "control characters", True),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_file_is_refused(case, tmp_path):
    content, message, library_too = BAD[case]
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        read_header(path)
    assert message in str(caught.value)
    assert caught.value.where == path
    assert all(c.isprintable() or c == "\n" for c in str(caught.value))
    if library_too:  # we are at least as strict as the format's own library
        with pytest.raises((SafetensorError, OSError, RecursionError)), safe_open(path, "pt"):
            pass


@pytest.mark.parametrize("kind", ["missing", "folder", "fifo", "device", "socket", "dangling link"])
def test_only_regular_files(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a socket's path must be short
    path = tmp_path / "model.safetensors"
    if kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)  # opening it naively would wait for ever
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "socket":
        socket.socket(socket.AF_UNIX).bind(path.name)
    elif kind == "dangling link":
        path.symlink_to(tmp_path / "missing file")
    message = {"missing": "missing", "dangling link": "missing file"}.get(kind, "not a regular file")
    with pytest.raises(CheckpointError, match=message) as caught:
        read_header(path)
    assert caught.value.where == path


def test_unusual_but_true(tmp_path):
    """Padding, no metadata, a scalar, empty tensors, an empty file, names beyond ASCII, tensors out of order."""
    header = {
        "später": {"dtype": "U8", "shape": [3], "data_offsets": [4, 7]},
        "scalar": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]},
        "empty": {"dtype": "I64", "shape": [0, 2**40], "data_offsets": [4, 4]},
    }
    text = json.dumps(header).encode() + b"   "
    path = tmp_path / "x.safetensors"
    path.write_bytes(raw_file(text, b"1234567"))
    read = read_header(path)
    start = 8 + len(text)
    assert [(t.name, t.shape, t.offset, t.nbytes) for t in read.tensors] == [
        ("scalar", (), start, 4),
        ("empty", (0, 2**40), start + 4, 0),
        ("später", (3,), start + 4, 3),
    ]
    assert read.metadata == {}
    path.write_bytes(raw_file({"__metadata__": {"format": "pt"}}))
    assert read_header(path).tensors == ()
    assert read_header(path).metadata == {"format": "pt"}


@settings(deadline=None)
@given(
    st.dictionaries(
        st.text(st.characters(min_codepoint=32, exclude_categories=("Cs", "Cc", "Zl", "Zp")), min_size=1),
        st.tuples(
            st.sampled_from([torch.float32, torch.bfloat16, torch.uint8, torch.bool, torch.int64, torch.float64]),
            st.lists(st.integers(0, 4), max_size=3),
        ),
        max_size=6,
    )
)
def test_reads_what_the_library_writes(tmp_path_factory, specs):
    specs.pop("__metadata__", None)
    path = tmp_path_factory.mktemp("law") / "x.safetensors"
    path.write_bytes(save({name: torch.ones(shape).to(dtype) for name, (dtype, shape) in specs.items()}))
    header = read_header(path)
    assert {t.name: t.shape for t in header.tensors} == {n: tuple(shape) for n, (_, shape) in specs.items()}
    content = path.read_bytes()
    for tensor in header.tensors:
        dtype, shape = specs[tensor.name]
        expected = torch.ones(shape).to(dtype).reshape(-1)
        stored = content[tensor.offset : tensor.offset + tensor.nbytes]
        assert stored == (expected.view(torch.uint8).numpy().tobytes() if expected.numel() else b"")


@settings(deadline=None)
@given(st.binary(max_size=80))
def test_any_bytes_are_read_or_refused(tmp_path_factory, junk):
    path = tmp_path_factory.mktemp("junk") / "x.safetensors"
    for content in (junk, raw_file(junk), raw_file(b"{" + junk)):
        path.write_bytes(content)
        try:
            read_header(path)
        except CheckpointError as error:
            assert error.where == path


@pytest.mark.parametrize(
    "text", ['{"a": 1e999}', '{"a": Infinity}', '{"a": -Infinity}', '{"a": 1, "a": 2}', "\ufeff{}"]
)
def test_strict_json(text, tmp_path):
    with pytest.raises(CheckpointError, match="strict JSON"):
        parse_json(text.encode(), tmp_path, "config")
