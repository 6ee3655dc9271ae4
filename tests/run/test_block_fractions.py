"""How much of a block is written, as it is reported while it is made."""

from __future__ import annotations

from collections import defaultdict

import pytest
from support import make_model

from deus_merge import api
from deus_merge.core.tensors import Action


def fractions(plan, out, **options) -> dict[str, list[float]]:
    """The fractions that a run reports, by the title of the block."""
    found: dict[str, list[float]] = defaultdict(list)
    api.merge(
        plan, out, api.RunOptions(**options), on_fraction=lambda block, fraction: found[block.title].append(fraction)
    )
    return found


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_every_block_begins_at_nothing_and_ends_at_all(tmp_path, dtype, threads):
    """Copies and zeros, casts, computed tensors, and tensors that several threads compute."""
    base, other = make_model(tmp_path / "base"), make_model(tmp_path / "other", seed=1)
    weights = {"model": str(base), "parameters": {"weight": 1}}, {"model": str(other), "parameters": {"weight": 2}}
    recipes = [{"merge_method": "linear", "models": list(weights)}, {"base_model": str(base), "upscale": {}}]
    for i, recipe in enumerate(recipes):
        plan = api.plan(recipe | ({"dtype": dtype} if dtype else {}))
        found = fractions(plan, tmp_path / f"out{i}", threads=threads, device="cpu")
        assert list(found) == [block.title for block in plan.blocks]
        for block in plan.blocks:
            reported = found[block.title]
            assert reported[0] == 0 and reported[-1] == 1 and reported == sorted(reported), block.title
            made = [output for output in block.outputs if output.action not in (Action.COPY, Action.ZEROS)]
            assert len(reported) >= 2 + len(made), block.title
            if block.merges and block.layers:
                assert any(0 < fraction < 1 for fraction in reported)


def test_workers_report_them_too(tiny, tmp_path):
    plan = api.plan({"base_model": str(tiny), "upscale": {}})
    found = fractions(plan, tmp_path / "out", workers=2, threads=1, device="cpu")
    assert set(found) == {block.title for block in plan.blocks}
    assert all(reported[0] == 0 and reported == sorted(reported) for reported in found.values())


def test_a_resumed_block_reports_nothing(tiny, tmp_path):
    plan = api.plan({"base_model": str(tiny), "upscale": {"preset": "stack"}})
    assert fractions(plan, tmp_path / "out")
    assert not fractions(plan, tmp_path / "out", resume=True)
