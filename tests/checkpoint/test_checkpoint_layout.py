"""The layout is a pure function: golden bytes, laws, and the format's own library as a reader."""

from __future__ import annotations

import json
import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from deus_merge.checkpoint import TensorEntry, index_json, plan_shards
from deus_merge.core.errors import PlanError
from deus_merge.core.units import BITS, ITEMSIZE

ENTRIES = (
    TensorEntry("embed", "BF16", (3, 2)),
    TensorEntry("norm", "F32", (2,)),
    TensorEntry("mask", "BOOL", (3,)),
    TensorEntry("head", "BF16", (3, 2)),
)


def test_golden_bytes():
    (shard,) = plan_shards([[e] for e in ENTRIES], 1000)
    text = (
        b'{"__metadata__":{"format":"pt"},'
        b'"norm":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},'
        b'"embed":{"dtype":"BF16","shape":[3,2],"data_offsets":[8,20]},'
        b'"head":{"dtype":"BF16","shape":[3,2],"data_offsets":[20,32]},'
        b'"mask":{"dtype":"BOOL","shape":[3],"data_offsets":[32,35]}}'
    )
    text += b" " * (-len(text) % 8)
    assert shard.header == len(text).to_bytes(8, "little") + text
    assert shard.filename == "model.safetensors"
    start = len(shard.header)
    assert dict(shard.tensors) == {
        "norm": (start, start + 8),
        "embed": (start + 8, start + 20),
        "head": (start + 20, start + 32),
        "mask": (start + 32, start + 35),
    }
    assert shard.size == start + 35


def test_golden_split_and_index():
    shards = plan_shards([[e] for e in ENTRIES], 20)
    assert [(s.filename, list(s.tensors)) for s in shards] == [
        ("model-00001-of-00002.safetensors", ["norm", "embed"]),
        ("model-00002-of-00002.safetensors", ["head", "mask"]),
    ]
    assert index_json(shards) == (
        b'{\n  "metadata": {\n    "total_size": 35\n  },\n  "weight_map": {\n'
        b'    "embed": "model-00001-of-00002.safetensors",\n'
        b'    "head": "model-00002-of-00002.safetensors",\n'
        b'    "mask": "model-00002-of-00002.safetensors",\n'
        b'    "norm": "model-00001-of-00002.safetensors"\n  }\n}\n'
    )


def test_a_tensor_over_the_limit_is_alone():
    entries = [TensorEntry(n, "U8", (size,)) for n, size in [("a", 4), ("b", 50), ("c", 4), ("d", 6), ("e", 1)]]
    assert [list(s.tensors) for s in plan_shards([[e] for e in entries], 10)] == [["a"], ["b"], ["c", "d"], ["e"]]


NAMES = st.text(st.characters(exclude_categories=("Cs",)), min_size=1).filter(lambda n: n != "__metadata__")


@st.composite
def block_lists(draw) -> list[list[TensorEntry]]:
    """Blocks of up to eight tensors, empty blocks and empty tensors among them."""
    names = draw(st.lists(NAMES, min_size=1, max_size=16, unique=True))
    whole = sorted(code for code, bits in BITS.items() if bits % 8 == 0)
    dtypes, shapes = st.sampled_from(whole), st.lists(st.integers(0, 5), max_size=3).map(tuple)
    blocks: list[list[TensorEntry]] = [[]]
    for name in names:
        if draw(st.booleans()) or len(blocks[-1]) == 8:
            blocks.append([])
        blocks[-1].append(TensorEntry(name, draw(dtypes), draw(shapes)))
    return blocks


def size_of(entries) -> int:
    return sum(entry.nbytes for entry in entries)


@settings(deadline=None)
@given(block_lists(), st.integers(1, 400))
def test_laws_of_the_cut(blocks, limit):
    """Files end at block bounds; a block over the limit has files of its own."""
    shards = plan_shards(blocks, limit)
    order = {e.name: i for i, e in enumerate(e for block in blocks for e in block)}
    block_of = {e.name: i for i, block in enumerate(blocks) for e in block}
    split = {i for i, block in enumerate(blocks) if size_of(block) > limit}
    assert sorted(n for s in shards for n in s.tensors) == sorted(order)  # every name once
    bounds = [(min(order[n] for n in s.tensors), max(order[n] for n in s.tensors)) for s in shards]
    assert all(last + 1 == first for (_, last), (first, _) in zip(bounds, bounds[1:], strict=False))  # in order
    for shard in shards:
        owners = {block_of[n] for n in shard.tensors}
        if owners & split:
            assert len(owners) == 1  # nothing else is with a split block
        else:
            assert set(shard.tensors) == {e.name for i in owners for e in blocks[i]}  # whole blocks
        assert size_of(shard.entries.values()) <= limit or len(shard.entries) == 1
    for shard, (_, last), after in zip(shards, bounds, shards[1:], strict=False):  # a file ends only where it must
        following = next(n for n, i in order.items() if i == last + 1)
        owner, size = block_of[following], size_of(shard.entries.values())
        if owner in split or block_of[next(iter(shard.tensors))] in split:
            assert owner != block_of[next(iter(shard.tensors))] or size + after.entries[following].nbytes > limit
        else:
            assert size + size_of(blocks[owner]) > limit


@settings(deadline=None)
@given(block_lists(), st.integers(1, 400))
def test_laws_of_a_file(tmp_path_factory, blocks, limit):
    """Contiguous, aligned, and read by the format's own library."""
    shards = plan_shards(blocks, limit)
    folder = tmp_path_factory.mktemp("law")
    for shard in shards:
        total = size_of(shard.entries.values())
        at = len(shard.header)
        assert at % 8 == 0
        for name, (begin, end) in shard.tensors.items():
            assert begin == at and end - begin == shard.entries[name].nbytes  # contiguous
            assert begin % ITEMSIZE[shard.entries[name].dtype] == 0  # aligned
            at = end
        assert at == shard.size
        path = folder / shard.filename
        path.write_bytes(shard.header + bytes(total))
        with safe_open(path, "np") as file:
            assert set(file.keys()) == set(shard.tensors)
            for entry in shard.entries.values():
                view = file.get_slice(entry.name)
                assert (tuple(view.get_shape()), view.get_dtype()) == (entry.shape, entry.dtype)
    index = json.loads(index_json(shards))
    assert index["weight_map"] == {n: s.filename for s in shards for n in s.tensors}
    assert plan_shards(blocks, limit) == shards


def test_a_block_is_not_cut_where_a_tensor_would_fit():
    blocks = [[TensorEntry(f"{b}.{i}", "U8", (4,)) for i in range(2)] for b in "abc"]
    assert [list(s.tensors) for s in plan_shards(blocks, 12)] == [["a.0", "a.1"], ["b.0", "b.1"], ["c.0", "c.1"]]
    assert [list(s.tensors) for s in plan_shards(blocks, 16)] == [["a.0", "a.1", "b.0", "b.1"], ["c.0", "c.1"]]
    assert [len(s.tensors) for s in plan_shards(blocks, 7)] == [1] * 6
    large = [[TensorEntry("l.0", "U8", (9,)), TensorEntry("l.1", "U8", (3,)), TensorEntry("l.2", "U8", (4,))]]
    cut = plan_shards(blocks[:1] + large + blocks[1:], 11)
    assert [list(s.tensors) for s in cut] == [
        ["a.0", "a.1"], ["l.0"], ["l.1", "l.2"], ["b.0", "b.1"], ["c.0", "c.1"]
    ]  # fmt: skip


def test_a_layout_pickles():
    for layout in plan_shards([[e] for e in ENTRIES], 20):
        again = pickle.loads(pickle.dumps(layout))
        assert again == layout and list(again.tensors) == list(layout.tensors)
        with pytest.raises(TypeError):
            again.tensors["norm"] = (0, 0)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([], "no tensor to write"),
        ([TensorEntry("a", "F32", (1,)), TensorEntry("a", "F32", (1,))], "duplicate name"),
        ([TensorEntry("__metadata__", "F32", (1,))], "name"),
        ([TensorEntry("", "F32", (1,))], "name"),
        ([TensorEntry("\ud800", "F32", (1,))], "name"),
        ([TensorEntry("a", "float32", (1,))], "unknown dtype"),
        ([TensorEntry("a", "F32", (-1,))], "negative"),
    ],
)
def test_what_cannot_be_laid_out(entries, message):
    with pytest.raises(PlanError, match=message):
        plan_shards([[e] for e in entries], 100)
