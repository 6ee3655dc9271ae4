"""What blocks took their time for: in the manifest, in words, on the page."""

from __future__ import annotations

import dataclasses
import time

import pytest
from page_parser import check_stands_alone
from support import make_model, write_recipe

from deus_merge import api
from deus_merge.report.block_times import in_words
from deus_merge.report.manifest import read_manifest
from deus_merge.report.manifest_parts import ManifestBlock
from deus_merge.report.page import render_page
from deus_merge.run.times import COMPUTED, READ, WAITED, WROTE, Stopwatch, during


def test_no_moment_counts_twice():
    """A section within another takes its time from that one; outside of any, nothing is counted."""
    watch, began = Stopwatch(), time.perf_counter()
    with during(READ):
        time.sleep(0.01)
    with watch.during(COMPUTED):
        time.sleep(0.02)
        with during(READ):
            time.sleep(0.03)
            with during(COMPUTED):
                time.sleep(0.01)
    for _ in watch.each(WROTE, iter([1, 2])):
        time.sleep(0.01)
    took, seconds = time.perf_counter() - began, watch.seconds
    assert seconds["read"] >= 0.03 and seconds["computed"] >= 0.03 and seconds["wrote"] < 0.01
    assert seconds["waited"] == 0 and sum(seconds.values()) <= took - 0.03 + 1e-3


def test_off_the_processor_is_not_computing():
    watch = Stopwatch(on_processor=True)
    with watch.during(COMPUTED):
        time.sleep(0.05)
    assert watch.seconds[WAITED] > 0.045 and watch.seconds[COMPUTED] < 0.05


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("models") / "base", layers=4)


def test_every_block_says_it(base, tmp_path):
    text = f"base_model: {base}\nupscale: {{insert: {{after: [1]}}}}\n"
    plan = api.plan(write_recipe(tmp_path / "r.yml", text), max_shard_size=60_000)
    results = {"a": api.merge(plan, tmp_path / "a")}
    api.make_share(plan, tmp_path / "b", 1, 1)
    results["b"] = api.finish(plan, tmp_path / "b")
    for name, result in results.items():
        found = read_manifest(tmp_path / name).blocks
        assert [block.block for block in found] == [block.title for block in plan.blocks]
        assert all(value >= 0 for block in found for value in block.seconds.values())
        fused = next(seconds for block, seconds in ((b.block, b.seconds) for b in found) if block == "layer 2")
        copied = next(block.seconds for block in found if block.block == "layer 0")
        assert fused["computed"] > 0 and copied["computed"] == 0 and copied["wrote"] > 0
        assert result.times and abs(result.times["computed"] - sum(b.seconds["computed"] for b in found)) < 1e-3
        assert set(result.describe()["times"]) == {READ, COMPUTED, WROTE, WAITED}
    again = api.merge(plan, tmp_path / "a", api.RunOptions(resume=True))
    assert again.times is None and again.describe()["times"] is None


def test_what_is_read_counts_as_reading(base, tmp_path, monkeypatch):
    """Whether a method reads it whole or by rows."""
    from deus_merge.checkpoint.reader import Checkpoint

    real = Checkpoint.read
    monkeypatch.setattr(Checkpoint, "read", lambda self, name: (time.sleep(0.002), real(self, name))[1])
    text = (
        "merge_method: linear\nmodels: [{model: %s, parameters: {weight: 1}}, {model: %s, parameters: {weight: 1}}]\n"
    )
    api.merge(write_recipe(tmp_path / "r.yml", text % (base, base)), tmp_path / "out")
    read = read_manifest(tmp_path / "out").blocks[1].seconds["read"]
    assert read >= 2 * 9 * 0.002


SECONDS = {"read": 0.12, "computed": 0.8, "wrote": 0.05, "waited": 0.03}
WORDS = "read 12 %, computed 80 %, wrote 5 %, waited 3 %: computing bounds this run"


def test_in_words_and_on_the_page(base, tmp_path):
    assert in_words(SECONDS) == WORDS and in_words(None) is None
    assert in_words(dict.fromkeys(SECONDS, 0.0)) is None
    api.merge(api.upscale_recipe(str(base), insert={"after": [1]}), tmp_path / "out")
    manifest = read_manifest(tmp_path / "out")

    def page(*seconds) -> str:
        blocks = tuple(ManifestBlock(block=f"<{i}>", seconds=found) for i, found in enumerate(seconds))
        text = render_page(dataclasses.replace(manifest, blocks=blocks), "", {"checks": []}, folder="out")
        check_stands_alone(text)
        return text

    text = page(SECONDS)
    assert "Computing bounds this run" in text and WORDS in text and "80 %, 0.80 s" in text and "&lt;0&gt;" in text
    odd = [SECONDS | {"read": value} for value in (float("nan"), float("inf"), -1.0, 10**400)]
    assert "Time</h2>" not in page() and "Time</h2>" not in page(odd[2]) and "Time</h2>" not in page(odd[3])
    assert "80 %, 0.80 s" in page(odd[0], odd[1], odd[3], SECONDS)
