"""What addresses of buckets mean, and what a run finds and leaves there."""

from __future__ import annotations

from urllib.request import Request, urlopen

import pytest
from bucket_runs import put
from support import make_model

from deus_merge.checkpoint.bucket_pieces import BucketPieces
from deus_merge.checkpoint.storage import LoadOptions, open_sink, open_source
from deus_merge.core.errors import CheckpointError, MachineError
from deus_merge.run.bucket import kept_pieces
from deus_merge.run.events import unheard

pytest.importorskip("obstore.store")
pytestmark = pytest.mark.xdist_group("buckets")


@pytest.fixture
def out(moto, tmp_path):
    with moto.used():
        moto.make_bucket("places")
        yield f"s3://places/{tmp_path.name}/out"


def test_one_folder_has_one_address(out):
    """Otherwise --overwrite could remove a source that the recipe has by another name."""
    put(f"{out}/a%20b", "x", b"1")  # obstore's own reading: a folder named `a b`
    assert open_sink(f"{out}/a b").read("x") == b"1"
    for name in ("a%20b", "a%2520b", "a+b", "\u00e9 [1]*", "100%"):
        sink = open_sink(f"{out}/{name}")
        assert sink.read("x") is None and sink.put("x", name.encode()) and sink.read("x") == name.encode()
        assert open_sink(out).listed(name)[0].keys() == {"x"}
    for address in (f"{out}/x/../a b", f"{out}/./a b", f"{out}//a b", "s3://", "s3:///out"):
        with pytest.raises(CheckpointError, match="no empty parts"):
            open_source(address, LoadOptions())


def test_folders_that_a_console_made(moto, out):
    """Empty objects, whose names end with a slash, are nothing."""
    for name in ("", "1_Pooling/", ".deus-pieces/"):
        moto._ask(f"{out.removeprefix('s3://')}/{name}", "PUT")
    assert open_sink(out).listed() == ({}, [".deus-pieces", "1_Pooling"])
    assert not BucketPieces(out, "a" * 64, ["config.json"]).check(overwrite=False)


@pytest.mark.parametrize("event", ["block done", "piece done", "piece found"])
def test_pieces_are_promised_once_there_are_any(out, event):
    store = BucketPieces(out, "a" * 64, ())
    with pytest.raises(MachineError) as error, kept_pieces(store, unheard) as heard:
        heard({"event": event})
        raise MachineError("stopped")
    assert ("finished pieces are kept" in str(error.value)) is event.startswith("piece")


def test_a_source_is_never_replaced_by_another_name_of_it(run, moto, out, tmp_path):
    base = make_model(tmp_path / "base", layers=2)
    source = out.replace("s3:/", moto.url)  # the same objects, for everybody
    for file in base.iterdir():
        headers = {"x-amz-acl": "public-read", "Content-Type": "application/octet-stream"}
        urlopen(Request(f"{source}/{file.name}", file.read_bytes(), headers, method="PUT"), timeout=10).close()
    before = open_sink(out).listed()
    done = run("upscale", source, out, "--insert", "all", "--overwrite", expect=2)
    assert "a source of this output lies here" in done.err and "model.safetensors" in done.err
    assert open_sink(out).listed() == before
    run("upscale", base, out, "--insert", "all", "--overwrite")  # a copy of it may be replaced
