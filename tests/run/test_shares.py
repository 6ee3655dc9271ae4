"""Shares of an output and `finish`: the bytes and the manifest of a single run, however the work was divided."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import yaml
from run_content import content
from support import make_model, write_recipe

from deus_merge import api
from deus_merge.core.errors import CheckpointError, MachineError, PlanError, VerifyError
from deus_merge.run import piece_job
from deus_merge.run import pieces as run_pieces

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*.yml"))
SIZE = 60_000  # several files


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return [make_model(root / f"m{i}", layers=6, seed=i, max_shard_size="60KB") for i in range(3)]


@pytest.fixture(scope="module")
def deep_models(tmp_path_factory):
    """As many layers as the model of the recipes that ship."""
    root = tmp_path_factory.mktemp("deep")
    return [make_model(root / f"m{i}", layers=30, seed=i, tied=True, intermediate_size=32) for i in range(3)]


@pytest.fixture(scope="module")
def plan(models, tmp_path_factory):
    """Copies, zeros and fused layers: several pieces."""
    text = f"base_model: {models[0]}\nupscale: {{insert: {{count: 2}}}}\n"
    return api.plan(write_recipe(tmp_path_factory.mktemp("r") / "r.yml", text), max_shard_size=SIZE)


@pytest.fixture(scope="module")
def whole(plan, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "out"
    api.merge(plan, out)
    return content(out)


def store(out: Path) -> Path:
    """The folder of the only plan's pieces."""
    return next((out.parent / f".{out.name}.deus-pieces").iterdir())


def records(out: Path) -> list[Path]:
    return sorted(store(out).glob("done/*.json"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_in_shares(path, deep_models, tmp_path):
    """Three workers, in any order, documents included."""
    text = path.read_text(encoding="utf-8")
    named = sorted(_models(list(yaml.safe_load_all(text))))
    for i, name in enumerate(named):
        text = re.sub(rf"{re.escape(name)}(?![\w-])", str(deep_models[i]), text)
    planned = api.plan(write_recipe(tmp_path / "r.yml", text), max_shard_size=60_000)
    assert len(api.pieces(planned)) > 3
    api.merge(planned, tmp_path / "out")
    expected = content(tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    left = [api.make_share(planned, tmp_path / "out", number, 3).left for number in (3, 1, 2)]
    assert left[0] > left[1] > left[2] == 0
    api.finish(planned, tmp_path / "out")
    assert content(tmp_path / "out") == expected
    assert sorted(os.listdir(tmp_path)) == ["out", "r.yml"]


def _models(value) -> set[str]:
    """The models that a recipe names: paths and repositories, not its own documents."""
    if isinstance(value, dict):
        here = {v for k, v in value.items() if k in ("model", "base_model") and isinstance(v, str) and "/" in v}
        return here.union(*map(_models, value.values()))
    return set().union(*map(_models, value)) if isinstance(value, list) else set()


def test_a_worker_makes_its_share_and_nothing_twice(plan, whole, tmp_path):
    out, found = tmp_path / "out", api.pieces(plan)
    assert len(found) > 3
    first = api.make_share(plan, out, 1, 2)
    assert 0 < len(first.made) < len(found) and first.left == len(found) - len(first.made) and not out.exists()
    assert [path.stem for path in records(out)] == [piece.name for piece in first.made]
    before = {path: path.stat().st_mtime_ns for path in records(out)}
    blocks = []
    again = api.make_share(plan, out, 1, 1, on_block=lambda block, resumed: blocks.append((block.index, resumed)))
    assert again.found == first.made and again.left == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before
    done = {block.index for piece in first.made for block in piece.blocks}
    assert blocks == [(block.index, block.index in done) for block in plan.blocks]
    result = api.finish(plan, out)
    assert result.verification.passed and content(out) == whole
    assert os.listdir(tmp_path) == ["out"]


def test_what_is_missing_is_named(plan, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(PlanError, match="pieces are missing"):
        api.finish(plan, out)
    made = api.make_share(plan, out, 2, 2).made
    with pytest.raises(PlanError, match="missing") as raised:
        api.finish(plan, out)
    missing = [piece for piece in api.pieces(plan) if piece not in made]
    assert all(piece.title in str(raised.value) for piece in missing) and "--shard-of" in str(raised.value)
    assert not any(piece.title in str(raised.value) for piece in made)
    assert not out.exists() and len(records(out)) == len(made)


EMPTIED = {"blocks": {}, "files": {}, "checksums": {}, "identity": {}}
DAMAGES = ["no file", "short", "torn record", "another plan", "outside", "not JSON", *EMPTIED, "block 7"]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_record_that_does_not_match_its_files_is_no_piece(plan, whole, tmp_path, damage):
    """The piece is made again."""
    out = tmp_path / "out"
    api.make_share(plan, out, 1, 1)
    record = records(out)[1]
    data = json.loads(record.read_text())
    file = store(out) / "work" / data["folder"] / next(iter(data["files"]))
    if damage == "no file":
        file.unlink()
    elif damage == "short":
        os.truncate(file, file.stat().st_size - 1)
    elif damage == "torn record":
        record.write_bytes(record.read_bytes()[:-20])
    elif damage == "not JSON":
        record.write_text("[]")
    elif damage in EMPTIED:
        record.write_text(json.dumps(data | {damage: EMPTIED[damage]}))
    elif damage == "block 7":
        record.write_text(json.dumps(data | {"blocks": dict.fromkeys(data["blocks"], 7)}))
    else:
        change = {"plan_hash": "0" * 64} if damage == "another plan" else {"folder": f"../work/{data['folder']}"}
        record.write_text(json.dumps(data | change))
    with pytest.raises(PlanError, match="1 of . pieces is missing"):
        api.finish(plan, out)
    assert len(api.make_share(plan, out, 1, 1).made) == 1
    api.finish(plan, out)
    assert content(out) == whole


def test_a_flipped_bit_is_found_at_the_end(plan, whole, tmp_path):
    """In a fused tensor, which has no source to be compared with."""
    out = tmp_path / "out"
    api.make_share(plan, out, 1, 1)
    shard = next(s for s in plan.shards if any("layers.1.mlp.up_proj" in name for name in s.tensors))
    begin, _ = next(span for name, span in shard.tensors.items() if "layers.1.mlp.up_proj" in name)
    (file,) = store(out).rglob(shard.filename)
    with file.open("r+b") as stream:
        stream.seek(begin + 5)
        byte = stream.read(1)[0]
        stream.seek(begin + 5)
        stream.write(bytes([byte ^ 1]))
    new = {f"model.layers.{layer}.mlp.up_proj.weight" for layer in plan.new_layers}
    assert any(name in new for name in shard.tensors if "layers.1.mlp" in name) or 1 not in plan.new_layers
    with pytest.raises(VerifyError):
        api.finish(plan, out)
    assert not out.exists()
    with pytest.raises(VerifyError):  # and again: nothing that looks whole is left
        api.finish(plan, out)


def meanwhile(monkeypatch, work) -> None:
    """Do something while the next worker has begun its first piece and has written nothing."""
    real, begun = piece_job.engine_of, []

    def engine_of(workers):
        if not begun:
            begun.append(True)
            work()
        return real(workers)

    monkeypatch.setattr(piece_job, "engine_of", engine_of)


def test_two_workers_at_the_same_piece(plan, whole, monkeypatch, tmp_path):
    """One begins, another makes the whole share meanwhile, the first ends: either record is right."""
    out = tmp_path / "out"
    meanwhile(monkeypatch, lambda: api.make_share(plan, out, 1, 1))
    share = api.make_share(plan, out, 1, 1)
    assert len(share.made) == 1 and len(share.found) == len(api.pieces(plan)) - 1
    assert len(list(store(out).glob("work/00001-*"))) == 2
    api.finish(plan, out)
    assert content(out) == whole and os.listdir(tmp_path) == ["out"]


def test_a_worker_that_comes_too_late(plan, whole, monkeypatch, tmp_path):
    """The output is finished while it still makes a piece that another one has made, too."""
    out = tmp_path / "out"
    meanwhile(monkeypatch, lambda: (api.make_share(plan, out, 1, 1), api.finish(plan, out)))
    assert api.make_share(plan, out, 1, 1).complete and content(out) == whole
    assert api.make_share(plan, out, 1, 1).complete
    assert api.finish(plan, out).verification.passed and content(out) == whole


def test_a_finisher_that_another_one_overtakes(plan, whole, monkeypatch, tmp_path):
    """It began with all pieces there; when it gets the folder's lock, the output has its name."""
    out = tmp_path / "out"
    api.make_share(plan, out, 1, 1)
    real, begun = run_pieces.execute, []

    def overtaken(*arguments, **more):
        if not begun:
            begun.append(True)
            api.finish(plan, out)
        return real(*arguments, **more)

    monkeypatch.setattr(run_pieces, "execute", overtaken)
    result = api.finish(plan, out)
    assert result.verification.passed and any("already complete" in text for text in result.warnings)
    assert content(out) == whole and os.listdir(tmp_path) == ["out"]


def test_a_dry_run_of_the_end(plan, tmp_path):
    """Says what `finish` would say, and touches nothing."""
    out = tmp_path / "out"
    with pytest.raises(PlanError, match="missing"):
        api.preflight(plan, out, finishing=True)
    api.make_share(plan, out, 1, 1)
    api.preflight(plan, out, finishing=True)
    assert os.listdir(tmp_path) == [".out.deus-pieces"] and len(records(out)) == len(api.pieces(plan))
    api.finish(plan, out)
    assert any("already complete" in text for text in api.preflight(plan, out, finishing=True))


@pytest.mark.parametrize("at", ["linked", "journalled", "renamed"])
def test_a_finisher_that_is_stopped(plan, whole, monkeypatch, tmp_path, at):
    """The next one ends with the same output, wherever the first one was."""
    out = tmp_path / "out"
    api.make_share(plan, out, 1, 1)
    count = len(records(out))
    target, name = {
        "linked": ("deus_merge.checkpoint.output_folder.ShardWriter.__init__", None),
        "journalled": ("deus_merge.run.executor.other_files", None),
        "renamed": ("deus_merge.checkpoint.piece_store.PieceStore.discard", None),
    }[at]

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(target, stop)
        with pytest.raises(KeyboardInterrupt):
            api.finish(plan, out)
    assert out.exists() == (at == "renamed") and len(records(out)) == count
    result = api.finish(plan, out)
    assert result.verification.passed and content(out) == whole and os.listdir(tmp_path) == ["out"]


def test_pieces_of_unlike_machines_and_options(plan, whole, monkeypatch, tmp_path):
    """Other rounding needs --mixed-machines, at the worker and at the end; other options are never accepted."""
    out = tmp_path / "out"
    api.make_share(plan, out, 1, 2)
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "avx2")  # read when torch starts; it is part of the identity
    with pytest.raises(PlanError, match="instruction_set") as raised:
        api.make_share(plan, out, 2, 2)
    assert "--mixed-machines" in str(raised.value)
    api.make_share(plan, out, 2, 2, mixed_machines=True)
    with pytest.raises(PlanError, match="instruction_set"):
        api.finish(plan, out)
    result = api.finish(plan, out, mixed_machines=True)
    assert any("round differently" in text for text in result.warnings)
    assert "round differently" in (out / "deus_merge.json").read_text()
    monkeypatch.delenv("ATEN_CPU_CAPABILITY")
    other = tmp_path / "other"
    api.make_share(plan, other, 1, 2)
    with pytest.raises(PlanError, match="seed") as raised:
        api.make_share(plan, other, 2, 2, api.RunOptions(seed=7), mixed_machines=True)
    assert "--mixed-machines" not in str(raised.value)


def test_sources_that_change_between_two_workers(models, tmp_path):
    """Weights of the same layout are told apart by their time."""
    base = shutil.copytree(models[0], tmp_path / "base")
    recipe = write_recipe(tmp_path / "r.yml", f"base_model: {base}\nupscale: {{insert: {{count: 2}}}}\n")
    api.make_share(api.plan(recipe, max_shard_size=SIZE), tmp_path / "out", 1, 2)
    for file in models[1].glob("*.safetensors"):
        shutil.copyfile(file, base / file.name)
    with pytest.raises((PlanError, CheckpointError), match="sources"):
        api.make_share(api.plan(recipe, max_shard_size=SIZE), tmp_path / "out", 2, 2, mixed_machines=True)


def test_sources_that_change_before_the_end(models, tmp_path):
    """Also where no tensor is copied, so that nothing could be compared with them."""
    two = [Path(shutil.copytree(model, tmp_path / model.name)) for model in models[:2]]
    slices = ", ".join(f"{{model: {model}, layer_range: [0, 6]}}" for model in two)
    text = f"merge_method: slerp\nbase_model: {two[0]}\nparameters: {{t: 0.5}}\nslices: [{{sources: [{slices}]}}]\n"
    recipe, out = write_recipe(tmp_path / "r.yml", text), tmp_path / "out"
    api.make_share(api.plan(recipe, max_shard_size=SIZE), out, 1, 1)
    for file in models[2].glob("*.safetensors"):
        shutil.copyfile(file, two[1] / file.name)
    with pytest.raises(PlanError, match="made with other sources"):
        api.finish(api.plan(recipe, max_shard_size=SIZE), out, mixed_machines=True)
    assert not out.exists() and records(out)


def test_a_damaged_output_is_made_again_by_shares(plan, whole, tmp_path):
    out = tmp_path / "out"
    api.merge(plan, out, api.RunOptions())
    file = next(out.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(VerifyError):
        api.finish(plan, out)
    options = api.RunOptions(overwrite=True)
    with pytest.raises(PlanError, match="missing"):
        api.finish(plan, out, options)
    assert len(api.make_share(plan, out, 1, 1, options).made) == len(api.pieces(plan))
    api.finish(plan, out, options)
    assert content(out) == whole


def test_an_error_beside_another_output_is_an_error(plan, monkeypatch, tmp_path):
    """The output that is there is of another seed: it is not what this worker was asked for."""
    out = tmp_path / "out"
    api.merge(plan, out)

    def full(workers):
        raise MachineError("no space left")

    monkeypatch.setattr(piece_job, "engine_of", full)
    with pytest.raises(MachineError):
        api.make_share(plan, out, 1, 1, api.RunOptions(seed=1, overwrite=True))
    with pytest.raises(PlanError, match="missing"):
        api.finish(plan, out, api.RunOptions(seed=1, overwrite=True))


def test_pieces_of_another_plan_are_named_and_stay(plan, whole, tmp_path):
    out = tmp_path / "out"
    other = api.plan(plan.recipe, max_shard_size=10**9)
    api.make_share(other, out, 1, 1)
    with pytest.raises(PlanError, match="missing") as raised:
        api.finish(plan, out)
    assert "pieces of another plan" in str(raised.value) and other.hash[:16] in str(raised.value)
    api.make_share(plan, out, 1, 1)
    api.finish(plan, out)
    assert content(out) == whole and sorted(os.listdir(tmp_path)) == [".out.deus-pieces", "out"]


def test_an_output_that_is_in_the_way(plan, whole, models, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(models[1], out)
    with pytest.raises(PlanError, match="not empty"):
        api.make_share(plan, out, 1, 1)
    assert os.listdir(tmp_path) == ["out"]
    options = api.RunOptions(overwrite=True)
    api.make_share(plan, out, 1, 1, options)
    with pytest.raises(PlanError, match="not empty"):
        api.finish(plan, out)
    api.finish(plan, out, options)
    assert content(out) == whole


def test_a_calibration_changes_the_output_not_the_pieces(models, tmp_path):
    """So that a finisher that fails afterwards can begin again."""
    text = tmp_path / "text.txt"
    shutil.copy(ROOT / "README.md", text)
    tiny = ROOT / "deus_merge/models/tiny"
    recipe = write_recipe(
        tmp_path / "r.yml",
        f"base_model: {tiny}\nupscale: {{insert: {{count: 1}}}}\n"
        f"calibrate: {{text: {text}, tokens: 256, length: 64}}\n",
    )
    planned = api.plan(recipe, max_shard_size=300_000)
    api.merge(planned, tmp_path / "one")
    out = tmp_path / "out"
    api.make_share(planned, out, 1, 1)
    before = {p: p.read_bytes() for p in store(out).rglob("*.safetensors")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("deus_merge.run.executor.verify", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            api.finish(planned, out)
    assert {p: p.read_bytes() for p in store(out).rglob("*.safetensors")} == before
    api.finish(planned, out)
    assert content(out) == content(tmp_path / "one")
