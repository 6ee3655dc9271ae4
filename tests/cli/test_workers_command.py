"""``--workers``, ``--shard-of`` and ``finish`` on the command line."""

from __future__ import annotations

import json
import os

import pytest
import torch
from support import make_model, weights

from deus_merge.core.errors import PlanError
from deus_merge.run.device import check_alike
from deus_merge.run.engines import children


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("models") / "base", layers=6)


@pytest.fixture
def place(base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").symlink_to(base)
    return tmp_path


COMMON = ("copy_next", "out", "--model", "base", "--set", "upscale.insert=top_half", "--max-shard-size", "60kB")


def test_shares_and_what_they_say(run, place):
    first = run("merge", *COMMON, "--shard-of", "1/2")
    assert "pieces made; " in first.err and "of the output left" in first.err and first.out == ""
    missing = run("finish", *COMMON, expect=2).err
    assert "pieces are missing" in missing and "--shard-of 1/1" in missing and str(place) in missing
    second = run("merge", *COMMON, "--shard-of", "2/2", "--json", "--quiet")
    told = second.json()
    assert told["left"] == 0 and len(told["made"]) > 1 and told["found"] == [] and second.err == ""
    assert "deus-merge finish puts out together" in run("merge", *COMMON, "--shard-of", "1/1").err
    found = events(run("merge", *COMMON, "--shard-of", "1/1", "--json").err)
    assert {event["event"] for event in found} == {"block found", "piece found"}
    done = run("finish", *COMMON, "--json")
    assert done.json()["verification"]["passed"] and done.json()["num_layers"] == 9
    assert sorted(os.listdir(place)) == ["base", "out"]
    assert "out is complete" in run("merge", *COMMON, "--shard-of", "1/2").err
    assert "checked, nothing written" in run("merge", *COMMON, "--shard-of", "1/2", "--dry-run").err
    assert run("verify", "out", "--json").json()["passed"]
    alone = run("merge", "copy_next", "alone", *COMMON[2:], "--json")
    told = [(event["event"], event["index"]) for event in events(alone.err)]
    assert told == [(what, i) for i in range(11) for what in ("block started", "block done")]
    assert alone.json()["times"]["wrote"] > 0
    assert {name: t.tolist() for name, t in weights(place / "out").items()} == {
        name: t.tolist() for name, t in weights(place / "alone").items()
    }


def events(err: str) -> list[dict]:
    """The events that a command printed, and nothing else."""
    found = [json.loads(line) for line in err.splitlines()]
    assert [event["at"] for event in found] == sorted(event["at"] for event in found)
    return found


def test_a_dry_run_of_a_share_writes_nothing(run, place):
    assert "checked, nothing written" in run("merge", *COMMON, "--shard-of", "2/9", "--dry-run").err
    assert os.listdir(place) == ["base"]


def test_the_folder_of_pieces_is_as_documented(run, place):
    run("merge", *COMMON, "--shard-of", "1/1", "--quiet")
    (store,) = (place / ".out.deus-pieces").iterdir()
    plan_hash = run("plan", "copy_next", *COMMON[2:-2], "--json").json()["plan_hash"]
    assert store.name != plan_hash[:16]  # of another --max-shard-size
    for file in (store / "done").iterdir():
        record = json.loads(file.read_text())
        keys = "format piece plan_hash identity folder files checksums blocks seconds"
        assert sorted(record) == sorted(keys.split()) and record["piece"] == file.stem
        assert record["plan_hash"].startswith(store.name) and (store / "work" / record["folder"]).is_dir()


WRONG = {
    "share 0": (("merge", *COMMON, "--shard-of", "0/3"), "'0/3' is not a share", "3/8"),
    "share beyond": (("merge", *COMMON, "--shard-of", "4/3"), "'4/3' is not a share", "K from 1 to N"),
    "no share": (("merge", *COMMON, "--shard-of", "3"), "'3' is not a share", "K/N"),
    "no workers": (("merge", *COMMON, "--workers", "0"), "'0' is neither a number from 1 to 1024"),
    "a fraction": (("upscale", "base", "out", "--workers", "1.5"), "'1.5' is neither", "ray://HOST:PORT"),
    "another scheme": (("merge", *COMMON, "--workers", "dask://x"), "'dask://x' is neither", "ray://HOST:PORT"),
    "a file in the way": (("merge", "copy_next", "taken", *COMMON[2:], "--shard-of", "1/2"), "taken", "not a folder"),
    "inside a source": (("merge", "copy_next", "base/x", *COMMON[2:], "--shard-of", "1/2"), "must not contain"),
    "a web server": (("merge", "copy_next", "ftp://b/x", *COMMON[2:], "--shard-of", "1/2"), "must be on this machine"),
    "too little memory": (("merge", "opt_deus", *COMMON[1:], "--workers", "3", "--max-memory", "500MB"),
                          "more memory than allowed", "--max-memory"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_ways(run, place, name):
    (place / "taken").write_text("mine")
    arguments, *fragments = WRONG[name]
    done = run(*arguments, expect=2)
    assert done.out == "" and all(fragment in done.err for fragment in fragments), done.err
    assert sorted(os.listdir(place)) == ["base", "taken"] and "Traceback" not in done.err


def test_a_cluster_without_ray(run, place, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    done = run("merge", *COMMON, "--workers", "ray://head:10001", expect=2)
    assert "Ray is not installed" in done.err and "deus-merge[ray]" in done.err
    assert os.listdir(place) == ["base"]


def test_gpus_of_several_models_are_refused(monkeypatch):
    """They round differently, so the bytes would depend on who makes which block."""
    models = ["H200", "H200", "A100"]
    monkeypatch.setattr("torch.cuda.device_count", lambda: len(models))
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: models[device])
    for name, workers in (("cuda", 2), ("cuda", 1), ("cuda:2", 3), ("cpu", 3)):
        check_alike(torch.device(name), workers)
    with pytest.raises(PlanError, match="not alike") as raised:
        check_alike(torch.device("cuda"), 3)
    assert "A100, H200" in str(raised.value)


def test_each_worker_has_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    names = [children.device_of("cuda", number) for number in range(3)]
    assert names == ["cuda:0", "cuda:1", "cuda:0"]
    assert [children.device_of(name, 1) for name in ("cpu", "cuda:1", None)] == ["cpu", "cuda:1", None]
