"""Azure and Google, as their emulators speak: what the tests of S3 look at in more detail."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from bucket_runs import KILLED, RECIPES, content, files_of, objects, put, written
from bucket_servers import ROOT, Azurite, FakeGcs, Google
from support import make_model, write_recipe

from deus_merge import api
from deus_merge.checkpoint.storage import LoadOptions, _sink, open_sink, open_source
from deus_merge.core.errors import CheckpointError

pytest.importorskip("obstore.store")
pytestmark = pytest.mark.xdist_group("buckets")
OPTIONS = ("--insert", "all", "--max-shard-size", 60_000, "--threads", 1)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "base", layers=2, max_shard_size="60KB")


@pytest.fixture(scope="module")
def local(base, tmp_path_factory) -> dict[str, bytes]:
    """The files of a local run."""
    folder = tmp_path_factory.mktemp("local") / "out"
    recipe = written(RECIPES["ot_fuse"], base.parent, folder.parent)
    api.merge(api.plan(recipe, max_shard_size=60_000), folder, api.RunOptions(threads=1))
    return files_of(folder)


@pytest.fixture(scope="module", params=[Azurite, Google], ids=["azure", "google"])
def server(request, tmp_path_factory):
    with request.param.running(tmp_path_factory.mktemp("server")) as server, server.used():
        server.make_bucket("box")
        yield server


@pytest.fixture
def place(server, tmp_path) -> str:
    return f"{server.scheme}://box/{tmp_path.name}"


@pytest.fixture
def source(server, base, place) -> str:
    """The model in a bucket."""
    for file in base.iterdir():
        put(f"{place}/base", file.name, file.read_bytes())
    return f"{place}/base"


def weights(files: dict[str, bytes]) -> dict[str, bytes]:
    return {name: data for name, data in files.items() if name.endswith((".safetensors", "config.json"))}


def test_from_a_bucket_to_a_bucket(run, server, source, place, local, tmp_path):
    """Inspect, plan, a local output, an output beside the model, verify; nothing that is written or said has a key."""
    out = f"{place}/out"
    shown = [run("inspect", source), run("plan", "opt_deus", "--model", source)]
    shown += [run("upscale", source, tmp_path / "out", *OPTIONS), run("upscale", source, out, *OPTIONS)]
    assert weights(files_of(tmp_path / "out")) == weights(local) == weights(objects(out))
    shown += [run("verify", out), run("verify", tmp_path / "out"), run("inspect", out)]
    shown += [run("upscale", source, out, *OPTIONS, expect=2), run("upscale", source, out, *OPTIONS, "--resume")]
    assert "the output is not empty" in shown[-2].err and "already complete" in shown[-1].err
    shown += [run("upscale", source, out, *OPTIONS, "--overwrite")]
    said = "".join(done.out + done.err for done in shown).encode()
    files = objects(out)
    assert weights(files) == weights(local)
    manifest = json.loads(files["deus_merge.json"])
    assert manifest["sources"][0]["url"] == source and len(manifest["sources"][0]["etags"]) > 1
    assert server.secret.encode() not in b"".join([said, *files.values(), *files_of(tmp_path).values()])


def test_shares_and_finish(run, server, base, place, local, tmp_path):
    out, recipe = f"{place}/out", written(RECIPES["ot_fuse"], base.parent, tmp_path)
    options = ("--max-shard-size", 60_000, "--threads", 1)
    run("merge", recipe, out, *options, "--shard-of", "2/2")
    assert "missing" in run("finish", recipe, out, *options, expect=2).err
    assert "config.json" not in objects(out)
    run("merge", recipe, out, *options, "--shard-of", "1/2")
    run("finish", recipe, out, *options)
    assert content(objects(out)) == content(local)  # and nothing else is left


def test_a_killed_run_goes_on(run, server, place, tmp_path, monkeypatch):
    """With a file of several parts, which are never an object; then two workers."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    model, out = make_model(tmp_path / "wide", layers=1, vocab_size=25_000, hidden_size=64), f"{place}/out"
    text = f"base_model: {model}\nslices: [{{sources: [{{model: {model}, layer_range: [0, 1]}}]}}]\n"
    recipe = write_recipe(tmp_path / "r.yml", text + "merge_method: passthrough\n")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    killed = subprocess.run([sys.executable, "-c", KILLED, recipe, out, "6"], env=environment, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert [name for name in objects(out) if "/done/" in name] and "deus_merge.json" not in objects(out)
    assert [name.partition("/")[0] for name in server.unfinished("box")] == [tmp_path.name]
    options = ("--max-shard-size", 6_000_000, "--threads", 1, "--workers", 2)
    run("merge", recipe, out, *options, "--resume")
    run("merge", recipe, tmp_path / "out", *options[:-2])
    assert content(objects(out)) == content(files_of(tmp_path / "out"))


def test_a_source_that_changes(run, source, place, monkeypatch):
    """By its ETag, while the first file of the output is uploaded."""
    upload = _sink.Sink.upload
    name = next(name for name in objects(source) if name.endswith(".safetensors"))

    def changing(self, *arguments):
        put(source, name, objects(source)[name][:-1] + b"x")
        return upload(self, *arguments)

    monkeypatch.setattr(_sink.Sink, "upload", changing)
    done = run("upscale", source, f"{place}/out", *OPTIONS, expect=2)
    assert f"{source}/{name}: the file has changed since it was opened" in done.err
    assert "deus_merge.json" not in objects(f"{place}/out")


def test_names_and_small_objects(server, place):
    sink = open_sink(place)
    assert sink.put("b", b"1") and sink.put("c", b"1")
    sink.delete(["missing", "b", "absent", "c", "x"])
    assert sink.listed() == ({}, [])
    assert sink.put("x", b"1", create=True) and sink.put("x", b"1", create=True)
    assert not sink.put("x", b"2", create=True) and sink.read("x") == b"1"
    assert sink.put("x", b"2") and sink.read("x") == b"2" and sink.read("y") is None
    for name in ("a%20b", "a+b", "\u00e9 [1]*", "100%"):
        assert open_sink(f"{place}/{name}").put("x", name.encode())
        assert open_sink(f"{place}/{name}").read("x") == name.encode() and name in sink.listed()[1]


def test_refusals(run, server, base, source, place):
    bucket = "container" if server.scheme == "az" else "bucket"
    nobody = f"{server.scheme}://nobody/x"
    for command in (("inspect", nobody), ("upscale", base, nobody, *OPTIONS), ("verify", nobody)):
        assert f"no such {bucket}" in run(*command, expect=2).err
    with pytest.raises(CheckpointError, match=f"no such {bucket}"):
        open_sink(nobody).delete(["x"])
    assert "there are no files under this address" in run("inspect", f"{place}/nothing", expect=2).err
    assert "no user, password or query" in run("inspect", f"{source}?sig={server.secret}", expect=2).err


WRONG_KEYS = {
    "az": [
        ({"AZURE_STORAGE_ACCOUNT_KEY": "d3Jvbmc="}, "no right to read"),
        ({"AZURE_STORAGE_ACCOUNT_KEY": "no base64"}, "Invalid Access Key"),
        ({"AZURE_STORAGE_ACCOUNT_KEY": None, "AZURE_STORAGE_SAS_KEY": "sv=2021-12-02&sig=hunter2"}, "no right to read"),
        ({"AZURE_STORAGE_ACCOUNT_KEY": None, "AZURE_STORAGE_SAS_KEY": "hunter2"}, "SAS"),
        ({"AZURE_STORAGE_ACCOUNT_NAME": None}, "Account must be specified"),
        ({"AZURE_ALLOW_HTTP": None}, "AZURE_ALLOW_HTTP=true"),
        ({"AZURE_STORAGE_ACCOUNT_KEY": None, "AZURE_MSI_ENDPOINT": "http://127.0.0.1:9"}, "no valid credentials"),
    ],
    "gs": [
        ({"GOOGLE_BEARER_TOKEN": None, "GOOGLE_SKIP_SIGNATURE": "true"}, "no right to read"),
        ({"GOOGLE_BEARER_TOKEN": None, "GOOGLE_SERVICE_ACCOUNT": "/missing/key.json"}, "/missing/key.json"),
        ({"GOOGLE_BEARER_TOKEN": None, "GOOGLE_SERVICE_ACCOUNT_KEY": '{"private_key": "hunter2"}'}, "private_key_id"),
        ({"GOOGLE_ALLOW_HTTP": None}, "GOOGLE_ALLOW_HTTP=true"),
    ],
}


def test_wrong_credentials(run, server, base, source, place, monkeypatch):
    """One message with exit code 2, which tells no secret; nothing is written."""
    before = objects(place)
    for variables, text in WRONG_KEYS[server.scheme]:
        with monkeypatch.context() as patch:
            for name, value in variables.items():
                patch.setenv(name, value) if value else patch.delenv(name)
            for command in (("inspect", source), ("upscale", base, f"{place}/out", *OPTIONS)):
                told = run(*command, expect=2).err
                assert text in told and told.startswith("error: ") and "Traceback" not in told
                assert [line[:6] for line in told.splitlines() if line[:1] != " "] == ["error:"]
                assert not any(secret in told for secret in (server.secret, "d3Jvbmc=", "no base64", "hunter2"))
    assert objects(place) == before


@pytest.fixture
def fake(base, tmp_path):
    """fake-gcs-server with a model."""
    with FakeGcs.running(tmp_path) as server, server.used():
        server.make_bucket("box")
        for file in base.iterdir():
            server.upload("box", f"base/{file.name}", file.read_bytes())
        yield server


def test_fake_gcs_server(run, fake, local, tmp_path):
    """It ignores If-Match, so that we alone find out that a file is another one, and misses what is to be removed."""
    run("upscale", "gs://box/base", tmp_path / "out", *OPTIONS)
    assert weights(files_of(tmp_path / "out")) == weights(local)
    source = open_source("gs://box/base", LoadOptions())
    name, tensor = next(iter(source.tensors.items()))
    fake.upload("box", f"base/{tensor.file.name}", objects("gs://box/base")[tensor.file.name][:-1] + b"x")
    with pytest.raises(CheckpointError, match="the file has changed since it was opened"):
        source.read(name)
    names = list(objects("gs://box/base"))
    open_sink("gs://box/base").delete(["missing", names[0], "absent", *names[2:]])
    assert list(objects("gs://box/base")) == [names[1]]


def test_two_uploads_of_one_file(server, place, tmp_path, monkeypatch):
    """Azure knows parts by their file alone: the upload that is finished first takes those of the other one away."""
    monkeypatch.setattr(_sink, "PART", 5 << 20)
    file = tmp_path / "big"
    file.write_bytes(bytes(range(256)) * (28 << 10))
    overtaken = []

    class Overtaken(io.FileIO):
        def read(self, size):
            if self.tell() and not overtaken:
                overtaken.append(1)
                time.sleep(0.3)  # the first part is there
                other = threading.Thread(target=open_sink(place).upload, args=("big", file, lambda: None))
                other.start()
                other.join()
            return super().read(size)

    monkeypatch.setattr(_sink, "open", Overtaken, raising=False)
    open_sink(place).upload("big", file, lambda: None)
    assert overtaken and objects(place) == {"big": file.read_bytes()}
    assert not [name for name in server.unfinished("box") if name.startswith(tmp_path.name)]
