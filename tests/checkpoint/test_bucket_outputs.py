"""Outputs in a bucket: the files and the manifest of a local run, whatever happens on the way."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from bucket_runs import KILLED, RECIPES, content, files_of, objects, put, written
from bucket_servers import SECRET
from makers import fp8
from support import make_model, train_tokenizer, write_recipe

from deus_merge import api
from deus_merge.checkpoint.storage import _sink, open_sink
from deus_merge.core.errors import CheckpointError, MachineError, PlanError
from deus_merge.run.piece_job import PieceJob

obstore = pytest.importorskip("obstore")
pytest.importorskip("obstore.store")
pytestmark = pytest.mark.xdist_group("buckets")

ROOT = Path(__file__).parents[2]
SIZE = 60_000  # several files
OPTIONS = api.RunOptions(threads=1)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("models")
    for name, seed in (("base", 0), ("other", 1)):
        make_model(root / name, layers=2, seed=seed, max_shard_size="60KB")
        train_tokenizer(size=120).save(str(root / name / "tokenizer.json"))
        (root / name / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
        (root / name / "1_Pooling").mkdir()
        (root / name / "1_Pooling" / "config.json").write_text("{}")
    wide = {"hidden_size": 64, "intermediate_size": 128, "num_key_value_heads": 4}  # blocks divide every weight
    fp8.VARIANTS["fp8_block"].make(make_model(root / "float", layers=2, **wide), root / "fp8")
    return root


@pytest.fixture(scope="module", autouse=True)
def s3(moto):
    """A server, and the environment that obstore reads."""
    with moto.used():
        moto.make_bucket("outputs")
        yield moto


@pytest.fixture
def out(request, tmp_path, monkeypatch) -> str:
    """An address, and a scratch folder of its own."""
    (tmp_path / "scratch").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "scratch"))
    return f"s3://outputs/{tmp_path.name}/out"


@pytest.fixture
def plan(models, tmp_path):
    return api.plan(written(RECIPES["ot_fuse"], models, tmp_path), max_shard_size=SIZE)


@pytest.fixture(scope="module")
def local(models, tmp_path_factory):
    """The content of a local run of `plan`."""
    folder = tmp_path_factory.mktemp("local")
    api.merge(api.plan(written(RECIPES["ot_fuse"], models, folder), max_shard_size=SIZE), folder / "out", OPTIONS)
    return content(files_of(folder / "out"))


@pytest.mark.parametrize("name", RECIPES)
def test_the_files_of_a_local_run(run, models, out, tmp_path, name):
    """The command line, from the run to verify, with one process and with two: the same bytes, and nothing is left."""
    recipe, options = written(RECIPES[name], models, tmp_path), ("--max-shard-size", SIZE, "--threads", 1)
    run("merge", recipe, tmp_path / "out", *options)
    done = run("merge", recipe, out, *options, "--workers", 2 if name == "documents" else 1)
    assert f"{out}: 2 -> " in done.err and f"deus-merge verify {out}" in done.err
    here, there = files_of(tmp_path / "out"), objects(out)
    assert here.keys() == there.keys() and content(here) == content(there)
    assert str(tmp_path).encode() not in there["deus_merge.json"] and SECRET.encode() not in b"".join(there.values())
    assert list((tmp_path / "scratch").rglob("*.safetensors")) == []
    checked = json.loads(run("verify", out, *(() if name == "ot_fuse" else ("--quick",)), "--json").out)
    assert checked["folder"] == out and checked["passed"]
    results = {check["name"]: check["passed"] for check in checked["checks"]}
    assert results["checksums"] and results["zeroed tensors"] and results["files and headers"]
    assert name != "ot_fuse" or (results["tokenizer"] and results["transformers"] and results["layer kinds"])
    if name == "ot_fuse":
        assert "grown" in run("inspect", out).out
        assert "the output is not empty" in run("merge", recipe, out, *options, expect=2).err
        assert "already complete" in run("merge", recipe, out, *options, "--resume").err
        assert run("report", out, "--html", tmp_path / "x.html").out.strip() == str(tmp_path / "x.html")
        put(out, "model.safetensors.index.json", b"{}")
        assert "failed verification" in run("verify", out, "--quick", expect=3).err


def test_shares_and_finish(plan, out, local):
    for number in (3, 1):
        api.make_share(plan, out, number, 3, OPTIONS)
    with pytest.raises(PlanError, match="is missing|are missing"):
        api.finish(plan, out)
    assert "deus_merge.json" not in objects(out) and "config.json" not in objects(out)
    assert api.make_share(plan, out, 2, 3, OPTIONS).left == 0
    assert not api.make_share(plan, out, 1, 3, OPTIONS).made
    api.finish(plan, out)
    assert content(objects(out)) == local
    assert api.make_share(plan, out, 1, 3, OPTIONS).complete
    assert api.finish(plan, out).warnings[-1].startswith("the output is already complete")
    put(out, f".deus-pieces/{plan.hash[:16]}/begun.json", b"{}")  # stopped after the manifest: it goes on
    assert api.merge(plan, out, OPTIONS).warnings[-1].startswith("the output is already complete")
    assert content(objects(out)) == local


def test_a_worker_that_is_lost(plan, out, local):
    """Its piece is made again. Events tell of workers, pieces and blocks; the result has the times of all blocks."""
    events, ended, pids, killed = [], [], {}, []

    def heard(event):
        events.append(event)
        pids[event["worker"]] = event.get("pid", pids.get(event["worker"]))
        if event["event"] == "piece started" and not killed:
            killed.append(event["worker"])
            os.kill(pids[killed[0]], signal.SIGKILL)

    result = api.merge(
        plan, out, api.RunOptions(threads=1, workers=2), on_event=heard, on_block=lambda b, was: ended.append(b)
    )
    assert content(objects(out)) == local and sorted(b.index for b in ended) == list(range(len(plan.blocks)))
    told = {name: [event for event in events if event["event"] == name] for name in {e["event"] for e in events}}
    assert [(e["worker"], e["how"]) for e in told["worker lost"]] == [(killed[0], "killed by SIGKILL")]
    assert len(told["worker started"]) == 3 and len({e["pid"] for e in told["worker started"]}) == 3
    made = {event["piece"] for event in (*told["piece done"], *told.get("piece found", ()))}
    assert made == {piece.name for piece in api.pieces(plan)}
    assert {event["index"] for event in told["block done"]} == {block.index for block in plan.blocks}
    assert result.times and result.times["wrote"] > 0
    assert len(json.loads(objects(out)["deus_merge.json"])["blocks"]) == len(plan.blocks)


def test_what_was_copied_from_elsewhere_is_not_read_again(models, out, s3, tmp_path):
    """`finish` compares with the checksums that travel with the pieces."""
    source = f"s3://outputs/{tmp_path.name}/source"
    for file in (models / "base").iterdir():
        if file.is_file():
            put(source, file.name, file.read_bytes())
    text = f"slices: [{{sources: [{{model: {source}, layer_range: [0, 2]}}]}}]\nmerge_method: passthrough\n"
    recipe = write_recipe(tmp_path / "r.yml", text)
    api.make_share(api.plan(recipe), out, 1, 1, OPTIONS)
    plan = api.plan(recipe)
    before = len(s3.log.read_text())
    checks = api.finish(plan, out).verification.checks
    assert {check.name: check.passed for check in checks}["copied tensors"]
    assert f"GET /outputs/{tmp_path.name}/source/model" not in s3.log.read_text()[before:]


def test_a_run_killed_while_it_uploads_goes_on(out, s3, tmp_path, monkeypatch):
    """With files of several parts; the parts of the killed upload are never an object."""
    model = make_model(tmp_path / "wide", layers=1, vocab_size=25_000, hidden_size=64)
    text = f"base_model: {model}\nslices: [{{sources: [{{model: {model}, layer_range: [0, 1]}}]}}]\n"
    recipe = write_recipe(tmp_path / "r.yml", text + "merge_method: passthrough\n")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    killed = subprocess.run([sys.executable, "-c", KILLED, recipe, out, "5"], env=environment, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert [name for name in objects(out) if "/done/" in name]
    assert len(s3.unfinished("outputs")) == 1 and "deus_merge.json" not in objects(out)
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        api.inspect(out)
    assert list((tmp_path / "scratch").rglob("*.safetensors"))
    made = []
    plan = api.plan(recipe, max_shard_size=6_000_000)
    api.merge(plan, out, OPTIONS, on_block=lambda block, resumed: made.append(resumed))
    assert made.count(True) >= 1 and made.count(False) >= 1
    api.merge(plan, tmp_path / "out", OPTIONS)
    assert content(objects(out)) == content(files_of(tmp_path / "out"))
    assert list((tmp_path / "scratch").rglob("*.safetensors")) == []


def test_an_upload_that_is_not_wanted_any_more(out, s3, tmp_path, monkeypatch):
    """It leaves neither an object nor parts."""
    monkeypatch.setattr(_sink, "_CHECKED", 0.0)
    file, before = tmp_path / "big", s3.unfinished("outputs")
    file.write_bytes(bytes(30 << 20))

    def check():
        raise _sink.GivenUp

    with pytest.raises(_sink.GivenUp):
        open_sink(out).upload("big", file, check)
    for thread in _sink.threading.enumerate():
        if thread.name == "upload":
            thread.join(20)
    assert objects(out) == {} and s3.unfinished("outputs") == before


def test_small_objects_are_created_once(out):
    sink = open_sink(out)
    assert sink.put("x", b"1", create=True) and sink.put("x", b"1", create=True)
    assert not sink.put("x", b"2", create=True) and sink.read("x") == b"1"
    assert sink.put("x", b"2") and sink.read("x") == b"2" and sink.read("y") is None


def test_two_workers_at_one_piece(plan, out, local, monkeypatch):
    """The other one finishes everything while the first one uploads."""
    upload, others = _sink.Sink.upload, []

    def slower(self, *arguments):
        if not others:
            others.append(1)
            assert api.make_share(plan, out, 1, 1, OPTIONS).made
        return upload(self, *arguments)

    monkeypatch.setattr(_sink.Sink, "upload", slower)
    assert api.make_share(plan, out, 1, 1, OPTIONS).left == 0
    api.finish(plan, out)
    assert content(objects(out)) == local


def test_pieces_that_do_not_fit_their_records_are_made_again(models, out, tmp_path):
    plan = api.plan(written(RECIPES["ot_fuse"], models, tmp_path), max_shard_size=20_000)
    made = api.make_share(plan, out, 1, 1, OPTIONS).made
    there, sink = objects(out), open_sink(out)
    records = sorted(name for name in there if "/done/" in name)
    files = [next(iter(json.loads(there[name])["files"])) for name in records]
    assert len(made) == 5
    sink.delete([files[0], records[1]])
    put(out, files[2], there[files[2]][:-1] + bytes([there[files[2]][-1] ^ 1]))
    put(out, records[3], there[records[3]][:40])
    with pytest.raises(PlanError, match="4 of 5 pieces are missing"):
        api.finish(plan, out)
    assert api.make_share(plan, out, 1, 1, OPTIONS).made == made[:4]
    sink.put(files[4], there[files[4]][:-1])
    assert api.make_share(plan, out, 1, 1, OPTIONS).made == made[4:]
    api.finish(plan, out)
    assert {name: there[name] for name in files}.items() <= objects(out).items()


def test_files_that_change_before_the_manifest(plan, out, monkeypatch):
    """A file is replaced right after it was verified: the manifest does not come."""
    api.make_share(plan, out, 1, 1, OPTIONS)
    check = type(plan).check_sources
    calls = []

    def changing(self):
        calls.append(1)
        if len(calls) == 2:  # after the verification
            put(out, plan.shards[0].filename, bytes(plan.shards[0].size))
        return check(self)

    monkeypatch.setattr(type(plan), "check_sources", changing)
    with pytest.raises(PlanError, match="were changed or removed while it was put together"):
        api.finish(plan, out)
    assert "deus_merge.json" not in objects(out)


def test_overwrite(models, plan, out, local, tmp_path, monkeypatch):
    """The old model goes first: a run that stops leaves nothing that looks like one."""
    old = api.plan(written(RECIPES["documents"], models, tmp_path))
    api.merge(old, out, OPTIONS)
    before = objects(out)
    for call in (lambda: api.merge(plan, out, OPTIONS), lambda: api.make_share(plan, out, 1, 2, OPTIONS)):
        with pytest.raises(PlanError, match="the output is not empty"):
            call()
    api.preflight(plan, out, api.RunOptions(threads=1, overwrite=True))
    assert objects(out) == before
    upload, calls = _sink.Sink.upload, []

    def failing(self, *arguments):
        calls.append(1)
        if len(calls) == 2:
            raise MachineError("stopped")
        return upload(self, *arguments)

    monkeypatch.setattr(_sink.Sink, "upload", failing)
    overwrite = api.RunOptions(threads=1, overwrite=True)
    with pytest.raises(MachineError, match="finished pieces are kept in s3://"):
        api.merge(plan, out, overwrite)
    left = [name for name in objects(out) if not name.startswith(".deus-pieces/")]
    assert left == [plan.shards[0].filename]
    with pytest.raises(PlanError, match=f"an unfinished run of plan {plan.hash[:16]}"):
        api.merge(old, out, OPTIONS)
    resumed = []
    api.merge(plan, out, overwrite, on_block=lambda block, was: resumed.append(was))
    assert resumed[0] is True and content(objects(out)) == local
    api.merge(plan, out, overwrite, on_block=lambda block, was: resumed.append(was))
    assert resumed[-1] is False and content(objects(out)) == local


@pytest.mark.parametrize("name", ["notes.txt", "data/part-0", "1_Pooling/weights.bin"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_what_is_not_ours_stays(plan, out, name, overwrite):
    put(out, "config.json", b"{}")
    put(out, name, b"precious")
    with pytest.raises(PlanError, match="the output is not empty|holds more than a model"):
        api.merge(plan, out, api.RunOptions(overwrite=overwrite))
    assert objects(out) == {"config.json": b"{}", name: b"precious"}


def test_refusals(run, models, out, tmp_path, monkeypatch):
    recipe = written(RECIPES["ot_fuse"], models, tmp_path)
    assert "s3://nobody/out: no such bucket" in run("merge", recipe, "s3://nobody/out", expect=2).err
    secret = run("merge", recipe, f"s3://me:{SECRET}@outputs/x", expect=2).err
    assert "has no user, password or query" in secret and SECRET not in secret
    assert "no empty parts" in run("merge", recipe, "s3://outputs/a/../b", expect=2).err
    for address in ("s3://", "s3:///outputs", f"s3://me:{SECRET}@/outputs"):  # of a variable that is not set
        refused = run("merge", recipe, address, expect=2).err + run("verify", address, expect=2).err
        assert refused.count("no bucket in an address") == 2 and SECRET not in refused
    text = tmp_path / "text.txt"
    text.write_text("words " * 500)
    calibrated = run("upscale", models / "base", out, "--calibrate", text, expect=2)
    assert "cannot be calibrated" in calibrated.err
    inside = write_recipe(tmp_path / "s.yml", "merge_method: passthrough\nmodels: [{model: s3://outputs/m}]\n")
    for file in (models / "base").iterdir():
        if file.is_file():
            put("s3://outputs/m", file.name, file.read_bytes())
    assert "must not contain each other" in run("merge", inside, "s3://outputs/m", "--overwrite", expect=2).err
    for command in (("strip", out, tmp_path / "b"), ("calibrate", out, tmp_path / "b", "--text", text)):
        assert "download it" in run(*command, expect=2).err
    assert "--html" in run("report", out, expect=2).err
    with monkeypatch.context() as patch:
        patch.setattr("deus_merge.checkpoint.scratch.free_space", lambda path: 1000)
        assert "set TMPDIR" in run("merge", recipe, out, expect=2).err
    monkeypatch.setenv("AWS_SKIP_SIGNATURE", "true")
    assert "no right to read or write it" in run("merge", recipe, out, expect=2).err
    monkeypatch.delenv("AWS_SKIP_SIGNATURE")
    assert objects("s3://outputs/m").keys() == {f.name for f in (models / "base").iterdir() if f.is_file()}
    assert not any(name.endswith((".safetensors", "deus_merge.json")) for name in objects(out))


def test_a_bucket_that_vanishes(run, s3, models, tmp_path, monkeypatch):
    s3.make_bucket("vanishing")
    upload = _sink.Sink.upload

    def removing(self, *arguments):
        self.delete(objects("s3://vanishing/out"))
        s3.remove_bucket("vanishing")
        return upload(self, *arguments)

    monkeypatch.setattr(_sink.Sink, "upload", removing)
    done = run("merge", written(RECIPES["ot_fuse"], models, tmp_path), "s3://vanishing/out", expect=2)
    assert "no such bucket" in done.err and "Traceback" not in done.err


def test_pieces_of_other_machines(plan, out):
    api.make_share(plan, out, 1, 2, OPTIONS)
    with pytest.raises(PlanError, match="they differ in threads"):
        PieceJob(plan, Path(out), api.RunOptions(threads=2))
    PieceJob(plan, Path(out), api.RunOptions(threads=2), mixed_machines=True)
