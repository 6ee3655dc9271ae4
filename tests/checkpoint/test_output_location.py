"""OUT is a folder of this machine or in a bucket: every command that writes one refuses another address before it
writes."""

from __future__ import annotations

import os

import pytest

from deus_merge.checkpoint import OutputFolder
from deus_merge.core.errors import PlanError

ADDRESSES = [
    "s3://bucket/model", "gs://bucket/model", "az://container/model", "https://host/model", "hf://org/name",
    "file:///srv/model", "S3://bucket/model", "s3://bucket", "s3a+x.y-z://bucket/model",
]  # fmt: skip


BUCKETS = ("s3://", "gs://", "az://")


@pytest.fixture
def inside(tmp_path, monkeypatch):
    """An empty folder that the command is run in."""
    (empty := tmp_path / "inside").mkdir()
    monkeypatch.chdir(empty)
    return empty


def check_refused(done, out: str) -> None:
    assert f"{out.rstrip('/')}: the output must be on this machine" in done.err
    assert "expected: a local folder" in done.err and f"got:      an address ({out.split(':')[0]}://)" in done.err
    assert "hint:     write to a local folder" in done.err


@pytest.mark.parametrize("out", [a for a in ADDRESSES if a.count("/") == 3 and not a.startswith(BUCKETS)])
@pytest.mark.parametrize("more", [(), ("--overwrite",), ("--resume",), ("--dry-run",)])
def test_upscale(run, tiny, inside, out, more):
    check_refused(run("upscale", tiny, out, *more, expect=2), out)
    assert os.listdir(inside) == []


@pytest.mark.parametrize("out", ["s3://bucket/model", "s3://bucket/model/"])
def test_strip_and_demo(run, tiny, inside, tmp_path, out):
    """They write no bucket."""
    grown = tmp_path / "grown"
    run("upscale", tiny, grown)
    for command in (("strip", grown, out), ("demo", out), ("demo", out, "--tiny")):
        check_refused(run(*command, expect=2), "s3://bucket/model")
    assert os.listdir(inside) == []


@pytest.mark.parametrize("out", ADDRESSES)
def test_from_python(out, inside):
    with pytest.raises(PlanError, match="must be on this machine"):
        OutputFolder(out, plan_hash="p")
    assert os.listdir(inside) == []


@pytest.mark.parametrize("out", ["a:b/c", "c:/model", "1s3:/x", "s3:", "models/s3:/x", "./x://y/z"])
def test_local_names_with_colons(out, inside):
    """A colon alone does not make an address."""
    assert OutputFolder(out, plan_hash="p").out == (inside / out).resolve()
