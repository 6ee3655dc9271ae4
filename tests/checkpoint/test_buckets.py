"""Models in a bucket: S3 as moto's server speaks it, which runs in an environment of its own."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from bucket_servers import SECRET
from support import make_model

from deus_merge import api
from deus_merge.checkpoint.storage._transfer import Remote

obstore = pytest.importorskip("obstore")
pytest.importorskip("obstore.store")

pytestmark = pytest.mark.xdist_group("buckets")
RECIPES = {
    "passthrough": "slices: [{sources: [{model: MODEL, layer_range: [0, 2]}]}]\nmerge_method: passthrough\n",
    "linear": "merge_method: linear\nparameters: {weight: 1}\nmodels: [{model: MODEL}, {model: OTHER}]\n",
    "ot_fuse": "base_model: MODEL\nupscale: {preset: opt_deus, insert: all}\n",
}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("models")
    for name, seed in (("base", 0), ("other", 1)):
        make_model(root / name, layers=2, seed=seed, max_shard_size="60KB")
    return root


@pytest.fixture(scope="module")
def s3(models, moto):
    """A server with both models in the bucket ``models``, and the environment that obstore reads."""
    with moto.used():
        moto.make_bucket("models")
        store = obstore.store.S3Store("models")
        for file in models.glob("*/*"):
            obstore.put(store, f"deep/{file.relative_to(models)}", file.read_bytes())
        yield moto.url


def weights(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.suffix == ".safetensors" or p.name == "config.json"}


@pytest.mark.parametrize("name", RECIPES)
def test_the_bytes_of_a_local_run(run, s3, models, tmp_path, name):
    recipe = tmp_path / "recipe.yml"
    outs = []
    for root in (str(models), "s3://models/deep"):
        recipe.write_text(RECIPES[name].replace("MODEL", f"{root}/base").replace("OTHER", f"{root}/other"))
        outs.append(tmp_path / f"out{len(outs)}")
        done = run("merge", recipe, outs[-1])
    assert weights(outs[0]) == weights(outs[1])
    assert {p.name for p in outs[0].iterdir()} == {p.name for p in outs[1].iterdir()}
    text = (outs[1] / "deus_merge.json").read_text()
    assert '"s3://models/deep/base"' in text and "etags" in text
    assert all(SECRET not in part for part in (done.out, done.err, text))


def test_a_changed_object_is_refused(s3, models):
    plan = api.plan(RECIPES["passthrough"].replace("MODEL", "s3://models/deep/base"))
    name, tensor = next(iter(plan.donor.checkpoint.tensors.items()))
    key = f"deep/base/{tensor.file.name}"
    store = obstore.store.S3Store("models")
    before = bytes(obstore.get(store, key).bytes())
    obstore.put(store, key, before[:-1] + b"x")
    try:
        with pytest.raises(api.DeusMergeError, match=f"s3://models/{key}: the file has changed since it was opened"):
            plan.donor.checkpoint.read(name)
        with pytest.raises(api.DeusMergeError, match="changed since the plan was made"):
            plan.check_sources()
    finally:
        obstore.put(store, key, before)


@pytest.mark.parametrize(
    ("ref", "text"),
    [
        ("s3://models/nothing", "s3://models/nothing: there are no files under this address"),
        ("s3://nobody/model", "s3://nobody/model: no such bucket"),
        ("s3://models/deep/base/config.json", "there are no files under this address"),
        (f"s3://me:{SECRET}@models/deep/base", "has no user, password or query"),
        (f"s3://models/deep/base?sig={SECRET}", "has no user, password or query"),
    ],
)
def test_refusals(run, s3, ref, text):
    done = run("inspect", ref, expect=2)
    assert text in done.err and SECRET not in done.err


def test_no_right_and_no_credentials(run, s3, monkeypatch):
    monkeypatch.setenv("AWS_SKIP_SIGNATURE", "true")
    denied = run("inspect", "s3://models/deep/base", expect=2)
    assert "s3://models/deep/base/config.json: no right to read it" in denied.err and "AWS_ACCESS_KEY_ID" in denied.err
    monkeypatch.delenv("AWS_SKIP_SIGNATURE")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    # where credentials are looked for without these, on a machine in the cloud: nobody answers
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("deus_merge.checkpoint.storage._transfer.FIRST_CONTACT", 0.5)
    missing = run("inspect", "s3://models/deep/base", expect=2)
    assert "AWS_ACCESS_KEY_ID" in missing.err or "cannot be reached" in missing.err
    assert SECRET not in denied.err + missing.err


def test_other_buckets_name_what_they_need(run, monkeypatch):
    for name in [name for name in os.environ if name.startswith(("AZURE_", "GOOGLE_"))]:
        monkeypatch.delenv(name)
    done = run("inspect", "az://container/model", expect=2)
    assert "AZURE_STORAGE_ACCOUNT_NAME" in done.err


def test_tokens_and_answers_about_lists():
    """As obstore words what no emulator says. A token that cannot be renewed in mid-run is asked for again."""
    told = "Generic GCS error: Error performing token request: Error performing GET http://a/b in 1ms - "
    lost = obstore.exceptions.GenericError(f"{told}HTTP error: error sending request")
    denied = obstore.exceptions.GenericError("Bulk delete request failed for key x: Not permitted. (code: 403)")
    missing = FileNotFoundError(f"{told}Server returned non-2xx status code: 404 Not Found: ")
    remote = Remote("gs://bucket/model", "gs://bucket/model", "bucket", credentials="set GOOGLE_...")
    for error, got in ((lost, "error sending request"), (missing, "HTTP 404 Not Found")):
        with pytest.raises(api.DeusMergeError, match=f"(?s)no valid credentials were found.*{got}.*set GOOGLE_"):
            remote._judge("", error, False)
    with pytest.raises(api.DeusMergeError, match="no right to read it"):
        remote._judge("", denied, False)
    remote._reached = True
    remote._judge("", lost, False)
