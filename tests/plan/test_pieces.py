"""`pieces` and `share`: every block and every file once, whatever the sizes; shares are equal on all machines."""

from __future__ import annotations

import importlib
import pickle
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import make_model, write_recipe

from deus_merge import api
from deus_merge.checkpoint.header import MAX_JSON
from deus_merge.core.errors import PlanError
from deus_merge.plan.pieces import share
from deus_merge.plan.timing import block_seconds
from deus_merge.report.plan_manifest import manifest_of


@pytest.fixture(scope="module")
def plans(tmp_path_factory):
    """The same recipe in files of many sizes, from one tensor each to everything in one file."""
    root = tmp_path_factory.mktemp("models")
    make_model(root / "base", layers=4)
    recipe = write_recipe(root / "r.yml", f"base_model: {root / 'base'}\nupscale: {{insert: all}}\n")
    return [api.plan(recipe, max_shard_size=size) for size in (1, 12_000, 30_000, 90_000, 200_000, 10**9)]


def test_every_block_and_every_file_once_and_no_file_in_two_pieces(plans):
    for plan in plans:
        found = api.pieces(plan)
        assert [block.index for piece in found for block in piece.blocks] == list(range(len(plan.blocks)))
        assert [s.filename for piece in found for s in piece.shards] == [s.filename for s in plan.shards]
        for piece in found:
            written = {w.name for block in piece.blocks for output in block.outputs for w in output.written}
            assert written == {name for shard in piece.shards for name in shard.tensors}
        assert [piece.name for piece in found] == [f"{i:05d}-of-{len(found):05d}" for i in range(1, len(found) + 1)]
        assert sum(piece.nbytes for piece in found) == plan.bytes_written


def test_pieces_are_as_small_as_the_files_allow(plans):
    """A block that is larger than a file is one piece; blocks in one file are one piece."""
    counts = [len(api.pieces(plan)) for plan in plans]
    assert counts[0] == counts[1] == len(plans[0].blocks) and counts[-1] == 1
    assert counts == sorted(counts, reverse=True)


def test_another_machine_finds_the_same_pieces(plans):
    for plan in plans:
        assert api.pieces(pickle.loads(pickle.dumps(plan))) == api.pieces(plan)


@given(index=st.integers(0, 5), total=st.integers(1, 40))
def test_shares_are_neighbours_and_all_together_everything(plans, index, total):
    found = api.pieces(plans[index])
    shares = [share(found, number, total) for number in range(1, total + 1)]
    assert [piece for one in shares for piece in one] == list(found)
    most = max(piece.seconds for piece in found)
    work = sum(piece.seconds for piece in found)
    assert all(sum(p.seconds for p in one) <= work / total + most + 1e-9 for one in shares)


def test_alignment_takes_time_and_copies_do_not(tmp_path):
    """New layers that are copies are worth as much as layers of the base; wider ones more than in proportion."""
    worth = {}
    for preset, width in (("copy_next", 64), ("opt_deus", 64), ("opt_deus", 4096)):
        base = make_model(tmp_path / f"{preset}-{width}", layers=2, intermediate_size=width)
        plan = api.plan(write_recipe(tmp_path / "r.yml", f"base_model: {base}\nupscale: {{preset: {preset}}}\n"))
        old, new = (next(b for b in plan.main_blocks if b.layers and b.new == is_new) for is_new in (False, True))
        worth[preset, width] = block_seconds(new) / block_seconds(old)
    assert worth["copy_next", 64] <= 1.01
    assert 10 < worth["opt_deus", 64] < worth["opt_deus", 4096]


@pytest.mark.parametrize(("number", "total"), [(0, 3), (4, 3), (-1, 2), (1, 0)])
def test_a_share_that_does_not_exist(plans, number, total):
    with pytest.raises(PlanError, match="no such share"):
        share(api.pieces(plans[0]), number, total)


def test_a_model_that_no_machine_holds(monkeypatch, tmp_path):
    """On sparse files: many pieces, soon, a manifest that can be read again. benchmarks/scale.py has a larger one."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    scale, planning = importlib.import_module("scale"), importlib.import_module("planning")
    config, layer, preset = scale.GIANTS["405B, opt_deus"]
    planning.make(tmp_path, config, layer)
    began = time.process_time()
    plan = api.plan({"base_model": str(tmp_path), "upscale": {"preset": preset}})
    found = api.pieces(plan)
    assert time.process_time() - began < 15 and len(found) >= 90
    shares = [share(found, number, 64) for number in range(1, 65)]
    assert [piece.name for one in shares for piece in one] == [piece.name for piece in found]
    manifest = manifest_of(plan, {}, {}, {}, {"device": "cpu", "threads": 1, "seed": 0})
    assert len(manifest.sealed()) < MAX_JSON
