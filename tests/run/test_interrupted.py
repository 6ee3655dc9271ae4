"""Runs that end early, through the public call: which blocks are resumed, and which results never get their name."""

from __future__ import annotations

import json
import os
import shutil

import pytest
from support import make_model, weights, write_recipe

from deus_merge import api
from deus_merge.core.errors import VerifyError
from deus_merge.run import preflight
from deus_merge.run.block_runner import run_blocks
from deus_merge.run.engines import one_process

SIZE = 40_000  # several files


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    """Copies, zeros and fused layers: seven blocks in several files."""
    folder = tmp_path_factory.mktemp("models")
    make_model(folder / "base", layers=3)
    recipe = write_recipe(folder / "recipe.yml", f"base_model: {folder / 'base'}\nupscale: {{insert: all}}\n")
    return api.plan(recipe, max_shard_size=SIZE)


@pytest.fixture(scope="module")
def whole(plan, tmp_path_factory):
    """Files and manifest of a run that was left alone."""
    out = tmp_path_factory.mktemp("whole") / "out"
    api.merge(plan, out)
    return content(out)


def content(out) -> dict[str, object]:
    """Every file; of the manifest all but times."""
    found = {p.name: p.read_bytes() for p in out.iterdir()}
    untimed = lambda d: {k: d[k] for k in d if k not in ("seconds", "date", "sha256")}  # noqa: E731
    return found | {"deus_merge.json": json.loads(found["deus_merge.json"], object_hook=untimed)}


def interrupted(plan, out, after: int, **options) -> list[int]:
    """A run that is stopped when this many blocks are finished."""
    finished = []

    def stop(block, resumed):
        assert not resumed
        finished.append(block.index)
        if len(finished) == after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        api.merge(plan, out, api.RunOptions(**options), on_block=stop)
    return finished


@pytest.mark.parametrize("after", [1, 3, 6, 7])
def test_finished_blocks_are_not_computed_again(plan, whole, monkeypatch, tmp_path, after):
    """The result, its manifest and its diagnostics are those of a run that was left alone."""
    out = tmp_path / "out"
    finished = interrupted(plan, out, after)
    assert finished == list(range(after)) and not out.exists()
    computed, reported = [], []

    def spy(plan, indices, *more, **options):
        computed.extend(indices)
        run_blocks(plan, computed, *more, **options)

    monkeypatch.setattr(one_process, "run_blocks", spy)
    api.merge(plan, out, api.RunOptions(resume=True), on_block=lambda b, resumed: reported.append((b.index, resumed)))
    assert computed == list(range(after, len(plan.blocks)))
    assert reported == [(index, index < after) for index in range(len(plan.blocks))]
    assert content(out) == whole
    layers = whole["deus_merge.json"]["layers"]
    assert all(bool(entry.get("diagnostics")) == entry["new"] for entry in layers)
    assert os.listdir(tmp_path) == ["out"]


def test_a_run_that_is_interrupted_again_and_again(plan, whole, tmp_path):
    out = tmp_path / "out"
    interrupted(plan, out, 1)
    for done in range(2, len(plan.blocks) + 1):
        seen = []

        def stop(block, resumed, seen=seen, done=done):
            seen.append(resumed)
            if len(seen) == done:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            api.merge(plan, out, api.RunOptions(resume=True), on_block=stop)
        assert seen == [True] * (done - 1) + [False]
    result = api.merge(plan, out, api.RunOptions(resume=True))
    assert result.verification.passed and content(out) == whole


def test_another_recipe_or_seed_is_refused(plan, whole, tmp_path):
    out = tmp_path / "out"
    interrupted(plan, out, 3)
    base = plan.models[0].checkpoint.folders[0]
    other = api.plan(api.upscale_recipe(base, insert={"after": [0]}), max_shard_size=SIZE)
    for unlike, options, told in ((other, {}, "plan"), (plan, {"seed": 7}, "seed")):
        with pytest.raises(api.DeusMergeError, match="cannot resume") as raised:
            api.merge(unlike, out, api.RunOptions(resume=True, **options))
        assert told in str(raised.value)
    with pytest.raises(api.DeusMergeError, match="--resume"):
        api.merge(plan, out)
    api.merge(plan, out, api.RunOptions(resume=True))
    assert content(out) == whole


def test_options_reach_the_blocks(plan, monkeypatch, tmp_path):
    seen = {}

    def spy(plan, indices, writer, **options):
        seen.update(options)
        run_blocks(plan, indices, writer, **options)

    monkeypatch.setattr(one_process, "run_blocks", spy)
    limit = plan.minimum_memory
    api.merge(plan, tmp_path / "out", api.RunOptions(seed=7, max_memory=limit))
    assert seen["seed"] == 7 and seen["max_memory"] == limit and seen["device"] == "cpu"


def staged(folder, pattern: str):
    return sorted(p for p in (folder / ".out.deus-tmp").rglob(pattern) if p.is_file())


def flip_last_byte(path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_wrong_result_never_gets_its_name(plan, tmp_path, overwrite):
    """Verification comes before the rename: a copied tensor changes on its way to the disk."""
    out = tmp_path / "out"
    if overwrite:
        api.merge(plan, out)
        before = content(out)

    def damage(block, resumed):
        if block.index == len(plan.blocks) - 1:
            flip_last_byte(staged(tmp_path, "*.safetensors")[0])  # the embeddings, which are copied

    options = api.RunOptions(overwrite=overwrite)
    with pytest.raises(VerifyError, match="copied tensors"):
        api.merge(plan, out, options, on_block=damage)
    assert out.exists() == overwrite
    if overwrite:
        assert content(out) == before
    api.merge(plan, out, api.RunOptions(overwrite=True, verify=False), on_block=damage)
    assert not api.verify(out).passed


def test_a_source_that_changes_during_the_run(tmp_path):
    base = make_model(tmp_path / "base", layers=2)

    def touch(block, resumed):
        if block.index == 2:
            os.utime(base / "model.safetensors", (1, 1))

    plan = api.plan(api.upscale_recipe(base, preset="copy_next"))
    with pytest.raises(VerifyError, match="a source has changed during the run"):
        api.merge(plan, tmp_path / "out", on_block=touch)
    assert not (tmp_path / "out").exists()


def test_a_source_that_changed_since_the_interruption(tmp_path):
    """Its headers, and so the plan, may be the same."""
    base = make_model(tmp_path / "base", layers=2)
    recipe = api.upscale_recipe(base, preset="copy_next")
    interrupted(api.plan(recipe), tmp_path / "out", 2)
    os.utime(base / "model.safetensors", (1, 1))
    with pytest.raises(api.DeusMergeError, match="cannot resume") as raised:
        api.merge(recipe, tmp_path / "out", api.RunOptions(resume=True))
    assert "sources" in str(raised.value)
    api.merge(recipe, tmp_path / "out", api.RunOptions(overwrite=True))


def test_a_finished_output_is_checked_again_by_resume(plan, tmp_path):
    out = tmp_path / "out"
    api.merge(plan, out)
    reported = []
    result = api.merge(plan, out, api.RunOptions(resume=True), on_block=lambda block, resumed: reported.append(resumed))
    assert "already complete" in result.warnings[-1] and reported == [True] * len(plan.blocks)
    other = api.plan(plan.recipe, max_shard_size="1MB")
    for unlike in ((other, {}), (plan, {"seed": 3})):
        with pytest.raises(api.DeusMergeError, match="not empty"):
            api.merge(unlike[0], out, api.RunOptions(resume=True, **unlike[1]))
    flip_last_byte(sorted(out.glob("*.safetensors"))[0])
    with pytest.raises(VerifyError):
        api.merge(plan, out, api.RunOptions(resume=True))
    os.utime(out / "deus_merge.json", (1, 1))  # older than its source
    with pytest.raises(api.DeusMergeError, match="not empty"):
        api.merge(plan, out, api.RunOptions(resume=True))


def test_a_finished_output_of_other_models_is_not_complete(tmp_path):
    """Fine-tunes have the headers and the config of their base, so the plans' hashes are the same."""
    for seed, name in enumerate("abc"):
        make_model(tmp_path / name, layers=2, seed=seed)
    plans = {}
    for other in "bc":
        text = "merge_method: linear\nparameters: {weight: 1}\nmodels:\n"
        text += f"- model: {tmp_path / 'a'}\n- model: {tmp_path / other}\n"
        plans[other] = api.plan(write_recipe(tmp_path / f"{other}.yml", text))
    assert plans["b"].hash == plans["c"].hash
    api.merge(plans["b"], tmp_path / "out")
    with pytest.raises(api.DeusMergeError, match="not empty"):
        api.merge(plans["c"], tmp_path / "out", api.RunOptions(resume=True))
    assert "already complete" in api.merge(plans["b"], tmp_path / "out", api.RunOptions(resume=True)).warnings[-1]


def test_files_of_outputs_and_sources_are_open_at_once(plan, monkeypatch, tmp_path):
    asked = []

    def no(count):
        asked.append(count)
        return False

    monkeypatch.setattr(preflight, "allow_open_files", no)
    with pytest.raises(api.DeusMergeError, match="too many files would be open"):
        api.merge(plan, tmp_path / "out")
    assert asked == [len(plan.shards) + 1] and len(plan.shards) > 3


def test_the_worst_plan_is_named(run, tmp_path):
    """One warning for all plans that did not converge."""
    base = make_model(tmp_path / "base", layers=3)
    said = run("upscale", base, tmp_path / "out", "--insert", "all", "--preset", "opt_deus_paper", "-p",
               "max_iterations=1", "-p", "tolerance=1e-9").err  # fmt: skip
    layers = json.loads((tmp_path / "out/deus_merge.json").read_text())["layers"]
    lines = [line for entry in layers for line in entry.get("diagnostics", ())]
    worst = max(lines, key=lambda line: line["marginal_error"])
    assert f"{sum(not line['converged'] for line in lines)} transport plans" in said
    assert f"the worst is {worst['tensor']}" in said


def test_resumed_copies_are_the_base_models(plan, tmp_path):
    out = tmp_path / "out"
    interrupted(plan, out, 4)
    shutil.copytree(tmp_path / ".out.deus-tmp", tmp_path / "kept")
    api.merge(plan, out, api.RunOptions(resume=True))
    base, ours = weights(plan.models[0].checkpoint.folders[0]), weights(out)
    for layer, at in ((0, 0), (1, 2), (2, 4)):
        for name in (n for n in base if f".layers.{layer}." in n):
            assert ours[name.replace(f".layers.{layer}.", f".layers.{at}.")].equal(base[name])
