"""The layout is a pure function: golden bytes, laws, and what the format's own library makes of it."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from deus_merge.checkpoint import TensorEntry, index_json, plan_shards
from deus_merge.core.errors import PlanError
from deus_merge.core.units import ITEMSIZE

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


def test_a_tensor_over_the_limit_stands_alone():
    entries = [TensorEntry(n, "U8", (size,)) for n, size in [("a", 4), ("b", 50), ("c", 4), ("d", 6), ("e", 1)]]
    assert [list(s.tensors) for s in plan_shards([[e] for e in entries], 10)] == [["a"], ["b"], ["c", "d"], ["e"]]


entry_lists = st.lists(
    st.builds(
        TensorEntry,
        st.text(st.characters(exclude_categories=("Cs",)), min_size=1).filter(lambda n: n != "__metadata__"),
        st.sampled_from(sorted(ITEMSIZE)),
        st.lists(st.integers(0, 5), max_size=3).map(tuple),
    ),
    min_size=1,
    max_size=12,
    unique_by=lambda entry: entry.name,
)


@settings(deadline=None)
@given(entry_lists, st.integers(1, 400))
def test_laws(tmp_path_factory, entries, limit):
    shards = plan_shards([[e] for e in entries], limit)
    names = [name for shard in shards for name in shard.tensors]
    assert sorted(names) == sorted(e.name for e in entries)  # a partition
    order = {e.name: i for i, e in enumerate(entries)}
    firsts = [(min(order[n] for n in s.tensors), max(order[n] for n in s.tensors)) for s in shards]
    assert all(last < first for (_, last), (first, _) in zip(firsts, firsts[1:], strict=False))  # in layer order
    folder = tmp_path_factory.mktemp("law")
    for shard in shards:
        total = sum(e.nbytes for e in shard.entries.values())
        assert total <= limit or sum(e.nbytes > 0 for e in shard.entries.values()) == 1
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
    assert plan_shards([[e] for e in entries], limit) == shards


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([], "no tensor"),
        ([TensorEntry("a", "F32", (1,)), TensorEntry("a", "F32", (1,))], "one name"),
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
