"""Models on a web server: the bytes of a local run, whatever the connection does; never a hole; never a secret."""

from __future__ import annotations

import json
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import xxhash
from bucket_runs import RECIPES as SHARED
from bucket_runs import written
from makers import fp8
from range_server import COMMIT, serving
from safetensors.torch import load_file
from support import make_model, train_tokenizer

from deus_merge import api
from deus_merge.checkpoint import Checkpoint
from deus_merge.checkpoint.lora import LoraSource
from deus_merge.checkpoint.shards import ShardWriter
from deus_merge.checkpoint.storage import LoadOptions, open_source
from deus_merge.core.errors import CheckpointError, MachineError

pytest.importorskip("obstore")

RECIPES = {
    "passthrough": """
slices:
- sources: [{model: MODEL, layer_range: [0, 3]}]
- sources: [{model: MODEL, layer_range: [1, 4]}]
merge_method: passthrough
""",
    "linear": """
merge_method: linear
base_model: MODEL
models: [{model: MODEL, parameters: {weight: 0.75}}, {model: OTHER, parameters: {weight: 0.25}}]
""",
    **SHARED,
}
SECRET = "hunter2-and-a-half"
ROOT = str(Path(__file__).parents[2])


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """Two models with a tokenizer, in several files, and one in a single file."""
    root = tmp_path_factory.mktemp("models")
    for name, seed in (("base", 0), ("other", 1)):
        make_model(root / name, seed=seed, hidden_size=64, intermediate_size=96, max_shard_size="150KB")
        tokenizer = train_tokenizer(size=120)
        tokenizer.save(str(root / name / "tokenizer.json"))
        (root / name / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
        (root / name / "LICENSE").write_text("free")
    make_model(root / "org" / "single", seed=2)
    wide = {"hidden_size": 64, "intermediate_size": 128, "num_key_value_heads": 4}  # blocks divide every weight
    fp8.VARIANTS["fp8_block"].make(make_model(root / "float", seed=3, **wide), root / "fp8")
    return root


@pytest.fixture
def server(models):
    with serving(models) as running:
        yield running


@pytest.fixture(autouse=True)
def small_cells(monkeypatch):
    """Files of 100 kB in many parts."""
    monkeypatch.setattr("deus_merge.checkpoint.storage._spool.CELL", 4096)
    monkeypatch.setattr("deus_merge.checkpoint.storage._spool.PART", 16384)


def weights(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.suffix == ".safetensors" or p.name == "config.json"}


@pytest.fixture(scope="module")
def local(models, tmp_path_factory):
    """The weights that a local run of each recipe gives."""
    made: dict[str, tuple[Path, dict]] = {}

    def of(name: str) -> tuple[Path, dict]:
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            recipe = written(RECIPES[name], str(models), folder)
            api.merge(api.plan(str(recipe)), folder / "out")
            made[name] = folder / "out", weights(folder / "out")
        return made[name]

    return of


def failing(*faults, when=lambda asked: asked.of_tensors):
    """One fault for each of the first requests for tensors, then none."""
    left = list(faults)
    return lambda asked: left.pop(0) if left and when(asked) else None


def ends_with(error: pytest.ExceptionInfo, *texts: str) -> None:
    assert all(text in str(error.value) for text in texts), str(error.value)


@pytest.mark.parametrize("name", RECIPES)
def test_the_bytes_of_a_local_run(run, server, local, tmp_path, name):
    folder, expected = local(name)
    done = run("merge", written(RECIPES[name], server.url, tmp_path), tmp_path / "out", "--json")
    assert weights(tmp_path / "out") == expected
    assert {p.name for p in folder.iterdir()} == {p.name for p in (tmp_path / "out").iterdir()}
    copied = next(check for check in done.json()["verification"]["checks"] if check["name"] == "copied tensors")
    assert copied["passed"] or name == "documents", copied
    manifest = json.loads((tmp_path / "out/deus_merge.json").read_text())
    assert manifest["plan_hash"] == json.loads((folder / "deus_merge.json").read_text())["plan_hash"]
    source = manifest["sources"][0]
    if name == "quantised":
        assert source["url"] == f"{server.url}/fp8" and list(source["etags"]) == ["model.safetensors"]
        return
    assert source["url"] == f"{server.url}/base" and "folder" not in source
    assert len(source["etags"]) == 4 and all(re.fullmatch('"[0-9a-f]{40}"', tag) for tag in source["etags"].values())


@pytest.mark.parametrize("shares", [0, 2])
def test_nothing_is_fetched_twice_for_copies_and_their_verification(run, server, models, tmp_path, shares):
    """Copies are checked by the checksums of what came, not by reading the source again; in shares, too."""
    text = RECIPES["passthrough"].replace("[1, 4]", "[3, 4]")
    plan = api.plan(str(written(text, server.url, tmp_path)), max_shard_size=100_000)
    for number in range(shares):
        api.make_share(plan, tmp_path / "out", number + 1, shares)
    result = (api.finish if shares else api.merge)(plan, tmp_path / "out")
    copied = next(check for check in result.verification.checks if check.name == "copied tensors")
    assert copied.passed is True
    size = sum(p.stat().st_size for p in (models / "base").glob("*.safetensors"))
    headers = [asked for asked in server.ranges if not asked.of_tensors]
    fetched = sum(asked.end - asked.begin for asked in server.ranges if asked.of_tensors)
    assert len(headers) == 4 and 0.95 * size < fetched <= size


def test_planning_costs_about_a_request_a_file(run, server, models, tmp_path):
    run("plan", written(RECIPES["ot_fuse"], server.url, tmp_path), "--json")
    assert len(server.ranges) == 4 == len(list((models / "base").glob("*.safetensors")))
    assert len(server.requests) <= 4 + 10
    assert not [asked for asked in server.ranges if asked.of_tensors]
    server.requests.clear()
    server.lists = False
    run("plan", written(RECIPES["ot_fuse"], server.url, tmp_path), "--json")
    assert len(server.requests) <= 4 + 10, [asked.path for asked in server.requests]


def test_a_server_that_lists_nothing(run, server, local, tmp_path):
    server.lists = False
    run("merge", written(RECIPES["passthrough"], server.url, tmp_path), tmp_path / "out")
    folder, expected = local("passthrough")
    assert weights(tmp_path / "out") == expected
    assert {p.name for p in folder.iterdir()} == {p.name for p in (tmp_path / "out").iterdir()}


def test_an_output_on_a_server_keeps_its_lineage(run, local, tmp_path):
    folder, _ = local("ot_fuse")
    with serving(folder.parent) as server:
        for lists in (True, False):
            server.lists = lists
            facts = run("inspect", f"{server.url}/out", "--json").json()
            assert facts["grown"] == "1, 3, 5" and facts["model"] == f"{server.url}/out"


@pytest.mark.parametrize(
    "faults", [(503, 503), ("truncated",), ("whole",), ("reset", "reset"), ("shifted",), ("slow",) * 4, (429, 408)]
)
def test_faults_that_pass(server, models, faults):
    """What is read is right, and each fault was met."""
    source = open_source(f"{server.url}/base", LoadOptions())
    left = []

    def fault(asked):
        left.append(1)
        return faults[len(left) - 1] if len(left) <= len(faults) else None

    server.fault = fault
    stored = load_file(next(iter(sorted((models / "base").glob("*.safetensors")))))
    for name, tensor in stored.items():
        assert torch.equal(source.read(name), tensor)
    assert len(left) > len(faults)


def test_a_header_longer_than_the_first_guess(server, models, monkeypatch):
    monkeypatch.setattr("deus_merge.checkpoint.storage._remote.GUESS", 100)
    source = open_source(f"{server.url}/base", LoadOptions())
    assert source.fingerprint == Checkpoint.open(models / "base").fingerprint
    assert len(server.ranges) == 8


@pytest.mark.parametrize(
    ("fault", "texts"),
    [
        ("whole", ["sends whole files", "206 Partial Content"]),
        (403, ["no right to read it", "HTTP 403 Forbidden"]),
        (418, ["refuses the request", "HTTP 418"]),
    ],
)
def test_faults_that_stay(server, fault, texts):
    source = open_source(f"{server.url}/base", LoadOptions())
    server.fault = lambda asked: fault if asked.of_tensors else None
    with pytest.raises(CheckpointError) as error:
        source.read("model.norm.weight")
    ends_with(error, *texts)
    server.fault = lambda asked: None
    assert source.read("model.norm.weight").shape == (64,)  # what failed is fetched again, not read as zeros


def test_it_gives_up_after_a_time(run, server, tmp_path, monkeypatch):
    source = open_source(f"{server.url}/base", LoadOptions(patience=1))
    server.fault = lambda asked: 503
    with pytest.raises(MachineError) as error:
        source.read("model.norm.weight")
    ends_with(error, f"{server.url}/base/model-0000", "the connection is lost", "HTTP 503")
    with pytest.raises(CheckpointError) as error:
        open_source(f"{server.url}/base", LoadOptions(patience=0.1))
    monkeypatch.setattr("deus_merge.checkpoint.storage._transfer.FIRST_CONTACT", 0.1)
    done = run("inspect", "http://127.0.0.1:9/model", expect=2)
    assert "http://127.0.0.1:9/model/config.json: the server cannot be reached" in done.err


def test_a_cut_in_a_run_is_survived_and_a_longer_one_resumed(run, server, local, tmp_path, monkeypatch):
    recipe = written(RECIPES["ot_fuse"], server.url, tmp_path)
    server.fault = failing(*[503] * 4)
    run("merge", recipe, tmp_path / "out")
    assert weights(tmp_path / "out") == local("ot_fuse")[1]
    half, done = len([asked for asked in server.ranges if asked.of_tensors]) // 2, []
    monkeypatch.setattr(LoadOptions.__init__, "__defaults__", (*LoadOptions.__init__.__defaults__[:-1], 0.5))

    def cut(asked):
        done.append(asked)
        return 503 if len([a for a in done if a.of_tensors]) > half else None

    server.fault = cut
    lost = run("merge", recipe, tmp_path / "cut", expect=1)
    assert "the connection is lost" in lost.err and "--resume" in lost.err
    server.fault = lambda asked: None
    run("merge", recipe, tmp_path / "cut", "--resume")
    assert weights(tmp_path / "cut") == local("ot_fuse")[1]


@pytest.mark.parametrize("name", ["passthrough", "ot_fuse"])
@pytest.mark.parametrize("tags", [True, False])
def test_a_source_that_changes_in_mid_run(run, models, tmp_path, name, tags):
    """By ETag, or by time of modification and size where the server has no ETags."""
    copy = tmp_path / "served" / "base"
    copy.mkdir(parents=True)
    for file in (models / "base").iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    with serving(copy.parent) as server:
        if not tags:
            server.tags = dict.fromkeys((file.name for file in copy.iterdir()), None)
        changed = []

        def change(asked):
            if asked.of_tensors and not changed:
                changed.append(1)
                for file in copy.glob("*.safetensors"):
                    data = bytearray(file.read_bytes())
                    data[-1] ^= 1
                    file.write_bytes(data)
                    os.utime(file, (1_000_000_000, 1_000_000_000))

        server.fault = change
        recipe = written(RECIPES[name], server.url, tmp_path)
        done = run("merge", recipe, tmp_path / "out", expect=3)
        assert "a source has changed during the run" in done.err and "--overwrite" in done.err
        assert not (tmp_path / "out").exists()


def test_a_changed_source_is_not_resumed(run, server, tmp_path, monkeypatch):
    """The ETags are part of what a resumed run must equal."""
    recipe = written(RECIPES["ot_fuse"], server.url, tmp_path)
    monkeypatch.setattr(LoadOptions.__init__, "__defaults__", (*LoadOptions.__init__.__defaults__[:-1], 0.3))
    count = []
    server.fault = lambda asked: count.append(1) or (503 if len(count) > 30 else None)
    run("merge", recipe, tmp_path / "out", expect=1)
    server.fault = lambda asked: None
    files = [f"model-0000{i}-of-00004.safetensors" for i in range(1, 5)]
    server.tags = dict.fromkeys(files, '"another"')
    done = run("merge", recipe, tmp_path / "out", "--resume", expect=2)
    assert "resume" in done.err
    server.tags = {}
    run("merge", recipe, tmp_path / "out", "--resume")


def test_no_secret_is_written_or_printed(run, server, tmp_path):
    """A password, and a signature, in the address of a model: in no file and no message, of success or failure."""
    cases = {"password": f"http://me:{SECRET}@{server.url[7:]}", "signature": server.url}
    for kind, root in cases.items():
        server.user = f"me:{SECRET}" if kind == "password" else None
        server.signature = SECRET if kind == "signature" else None
        query = f"?sig={SECRET}" if kind == "signature" else ""
        text = f"""
merge_method: linear
base_model: "MODEL{query}"
models:
- {{model: "MODEL{query}", parameters: {{weight: 0.75}}}}
- {{model: "OTHER{query}", parameters: {{weight: 0.25}}}}
"""
        recipe = written(text, root, tmp_path)
        assert SECRET in recipe.read_text()
        shown = [run("plan", recipe), run("plan", recipe, "--json"), run("plan", recipe, "--expand")]
        out = tmp_path / kind
        shown += [run("merge", recipe, out), run("report", out), run("merge", recipe, out, "--overwrite", "--json")]
        shown += [run("merge", recipe, out, expect=2)]
        server.fault = lambda asked: 403
        shown += [run("plan", recipe, expect=2), run("inspect", f"{root}/base{query}", expect=2)]
        server.fault = lambda asked: 418 if asked.of_tensors else None
        shown += [run("merge", recipe, tmp_path / "failed", expect=2)]
        server.fault = lambda asked: None
        wrong = written(text.replace(SECRET, f"{SECRET}x"), root.replace(SECRET, f"{SECRET}x"), tmp_path)
        shown += [run("plan", wrong, expect=2)]
        assert all(SECRET not in done.out + done.err for done in shown)
        for file in (p for p in tmp_path.rglob("*") if p.is_file() and p.name != "recipe.yml"):
            assert SECRET.encode() not in file.read_bytes(), file
        assert f"{server.url}/base" in (out / "deus_merge.yml").read_text()


def test_verify_reads_the_source_again_unless_quick(run, server, local, tmp_path):
    out = tmp_path / "out"
    run("merge", written(RECIPES["passthrough"], server.url, tmp_path), out)
    server.requests.clear()
    quick = {check["name"]: check for check in run("verify", out, "--quick", "--json").json()["checks"]}
    assert quick["copied tensors"]["passed"] is None and not server.requests
    full = {check["name"]: check for check in run("verify", out, "--json").json()["checks"]}
    assert full["copied tensors"]["passed"] is True, full["copied tensors"]
    assert sum(asked.end - asked.begin for asked in server.ranges) > 100_000
    server.tags = {"model-00001-of-00004.safetensors": '"another"'}
    changed = {check["name"]: check for check in run("verify", out, "--json").json()["checks"]}
    assert changed["copied tensors"]["passed"] is None
    assert f"source {server.url}/base has changed since" in changed["copied tensors"]["detail"]


def test_verify_takes_addresses(run, server, local, tmp_path, models):
    """Of a source that was local, and of one that has moved; signatures are not shown."""
    out, (there, _) = tmp_path / "out", local("passthrough")
    run("merge", written(RECIPES["passthrough"], server.url, tmp_path), out)
    place = f"{server.url}/base?signature=a=b&{SECRET}"
    for folder, name in ((out, f"{server.url}/base"), (there, "base")):
        server.requests.clear()
        done = run("verify", folder, "--json", "--source", f"{name}={place}")
        found = next(check for check in done.json()["checks"] if check["name"] == "copied tensors")
        assert found["passed"] is True and server.ranges and SECRET not in done.out + done.err
        told = run("verify", folder, "--quick", "--source", f"{name}={place}").out
        assert "is not read with --quick" in " ".join(told.split()) and SECRET not in told
    other = run("verify", out, "--json", "--source", f"{server.url}/base={models}/base").json()["checks"]
    assert next(check for check in other if check["name"] == "copied tensors")["passed"] is True
    wrong = run("verify", there, "--source", f"base={server.url}/missing?{SECRET}", expect=2)
    assert "cannot be read" in wrong.err and SECRET not in wrong.out + wrong.err


def test_a_changed_output_is_found_by_the_checksums_that_came(server, tmp_path, models):
    """The run's own verification compares what is on the disk with what came over the wire."""
    plan = api.plan(str(written(RECIPES["passthrough"], server.url, tmp_path)))
    (tmp_path / "new").mkdir()
    writer = ShardWriter(tmp_path / "new", plan.shards)
    pairs = [(t.name, t.stored) for block in plan.blocks for o in block.outputs for t in o.written]
    writer.copy_many(pairs)
    tensors = {n: t for f in (tmp_path / "new").glob("*.safetensors") for n, t in load_file(f).items()}
    for name, tensor in tensors.items():
        data = tensor.contiguous().view(torch.uint8).numpy().tobytes()
        assert writer.received[name] == xxhash.xxh3_128(data).hexdigest()
    assert len(writer.received) == len(pairs)
    writer.close()


def test_a_copy_of_the_source_reads_the_same(server, models):
    """Workers open it again, without what this process has fetched."""
    source = open_source(f"{server.url}/base", LoadOptions())
    again = pickle.loads(pickle.dumps(source))
    own = Checkpoint.open(models / "base")
    assert again.stamp() == source.stamp() and again.fingerprint == own.fingerprint
    for name in own.tensors:
        assert torch.equal(again.read(name), own.read(name))
        assert torch.equal(again.slice(name, 0, 2), own.read(name)[:2])
    assert again.remote.requests > 0 == source.spool.bytes_fetched


def test_two_workers(run, server, local, tmp_path):
    run("merge", written(RECIPES["ot_fuse"], server.url, tmp_path), tmp_path / "out", "--workers", 2)
    assert weights(tmp_path / "out") == local("ot_fuse")[1]


def test_an_adapter_on_a_model_elsewhere(server, models, tmp_path):
    peft = pytest.importorskip("peft")
    import transformers

    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    model = peft.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(models / "base"), config)
    model.save_pretrained(tmp_path / "adapter")
    text = "{model: MODEL}"
    recipe = f"merge_method: passthrough\nmodels: [{text}]\n"
    outs = []
    for root in (str(models), server.url):
        path = tmp_path / "r.yml"
        path.write_text(recipe.replace("MODEL", f"{root}/base+{tmp_path / 'adapter'}"))
        plan = api.plan(str(path))
        assert isinstance(plan.donor.checkpoint, LoraSource)
        out = tmp_path / f"out{len(outs)}"
        api.merge(plan, out)
        outs.append(weights(out))
    assert outs[0] == outs[1]


def test_the_hub_by_range(run, server, models, tmp_path, monkeypatch):
    """One request for the list, every other for the commit; the token is sent, and goes nowhere else."""
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", SECRET)
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
    recipe = tmp_path / "recipe.yml"
    recipe.write_text("merge_method: passthrough\nmodels: [{model: org/single}]\n")
    done = run("merge", recipe, tmp_path / "out", "--stream")
    own = f"merge_method: passthrough\nmodels: [{{model: {models / 'org/single'}}}]\n"
    api.merge(api.plan(own), tmp_path / "local")
    assert weights(tmp_path / "out")["model.safetensors"] == weights(tmp_path / "local")["model.safetensors"]
    assert [asked.path for asked in server.requests if "/api/models/" in asked.path] == ["/api/models/org/single"]
    asked_for = [asked for asked in server.requests if "/org/single" in asked.path]
    assert len(asked_for) > 3 and all(asked.headers["authorization"] == f"Bearer {SECRET}" for asked in asked_for)
    manifest = json.loads((tmp_path / "out/deus_merge.json").read_text())
    source = manifest["sources"][0]
    assert (source["url"], source["revision"]) == (f"{server.url}/org/single", COMMIT) and "etags" not in source
    assert SECRET not in done.out + done.err
    assert all(SECRET.encode() not in p.read_bytes() for p in (tmp_path / "out").iterdir())
    checks = {check["name"]: check["passed"] for check in run("verify", tmp_path / "out", "--json").json()["checks"]}
    assert checks["copied tensors"] is True
    missing = run("inspect", "org/none", "--stream", expect=2)
    assert "no such repository" in missing.err
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "while offline" in run("inspect", "org/single", "--stream", expect=2).err


def test_what_cannot_be_read(run, server, models, tmp_path, monkeypatch):
    for name, files, texts in (
        ("nothing", [], ["no config.json"]),
        ("pickles", ["config.json", "pytorch_model.bin"], ["pickled weights are read only from this machine"]),
        ("gguf", ["config.json", "m.gguf"], ["GGUF files are read only from this machine"]),
        ("adapter", ["adapter_config.json", "adapter_model.safetensors"], ["no config.json"]),
    ):
        folder = tmp_path / "bad" / name
        folder.mkdir(parents=True)
        for file in files:
            (folder / file).write_text("{}")
        with serving(tmp_path / "bad") as bad:
            done = run("inspect", f"{bad.url}/{name}", expect=2)
        assert all(text in done.err for text in texts), done.err
    assert "no config.json" in run("inspect", f"{server.url}/base/model.safetensors", expect=2).err
    server.tags = dict.fromkeys((p.name for p in (models / "base").iterdir()), None)
    assert "no storage has such addresses" in run("inspect", "ftp://host/model", expect=2).err
    import importlib.util

    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "obstore" else found(name, *a))
    for ref in (f"{server.url}/base", "s3://bucket/model", "gs://bucket/model", "az://container/model"):
        assert 'pip install "deus-merge[remote]"' in run("inspect", ref, expect=2).err


def test_a_program_that_ends_does_not_wait_for_requests(server):
    """An error or an interrupt ends it at once, though a lost connection would be tried for five minutes."""
    server.fault = lambda asked: 503 if asked.of_tensors else None
    code = (
        "import sys; from deus_merge.checkpoint.storage import LoadOptions, open_source\n"
        "source = open_source(sys.argv[1], LoadOptions()); source.prefetch(source.tensors)\n"
    )
    command = [sys.executable, "-c", code, f"{server.url}/base"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env={**os.environ, "PYTHONPATH": ROOT})
    assert done.returncode == 0 and not done.stderr, done.stderr
