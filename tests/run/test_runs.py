"""A run as a process: interrupted and resumed, refused, overwritten, verified; what verify finds."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from support import make_model, token_ids, write_recipe

COMMAND = [sys.executable, "-m", "deus_merge"]


def start(*arguments) -> subprocess.Popen:
    """A run that Ctrl-C reaches, also where the tests themselves were started in the background, which ignores it."""
    return subprocess.Popen(
        [*COMMAND, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def stopped(kill: signal.Signals, out: Path, *arguments) -> tuple[int, str]:
    """Exit code and messages of a run that a signal stopped after some blocks. On a busy machine the run may be over
    before the signal is sent: then another one is tried."""
    for _ in range(10):
        process = start(*arguments)
        while not list(out.parent.glob(f".{out.name}.deus-tmp/new/*.safetensors")) and process.poll() is None:
            time.sleep(0.01)
        time.sleep(0.2)  # some blocks
        process.send_signal(kill)
        _, told = process.communicate(timeout=60)
        if process.returncode != 0:
            return process.returncode, told
        shutil.rmtree(out)
    pytest.fail("ten runs were over before the signal")


def model_bytes(folder) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "deus_merge.json"}


@pytest.mark.slow  # in this process: test_interrupted.py
@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGINT])
def test_a_stopped_run_goes_on_and_ends_the_same(run, tmp_path, kill):
    base = make_model(tmp_path / "base", layers=24, hidden_size=64, intermediate_size=1280)
    run("upscale", base, tmp_path / "whole", "--insert", "all", "--threads", "1")
    command = ("upscale", base, tmp_path / "out", "--insert", "all", "--threads", "1")
    code, told = stopped(kill, tmp_path / "out", *command)
    assert not (tmp_path / "out").exists()
    if kill == signal.SIGINT:
        assert code == 130 and "--resume" in told
        other = run(*command[:-2], "--threads", "2", "--resume", expect=2)
        assert "threads" in other.err
        done = run(*command, "--resume")
        assert "finished by the earlier run" in done.err
    else:
        assert code == -signal.SIGKILL
        run(*command, "--resume")
    assert model_bytes(tmp_path / "out") == model_bytes(tmp_path / "whole")
    assert [p.name for p in tmp_path.iterdir() if p.name.endswith("deus-tmp")] == []


@pytest.mark.slow
def test_resume_refuses_another_recipe(run, tmp_path):
    base = make_model(tmp_path / "base", layers=24, hidden_size=64, intermediate_size=1280)
    stopped(signal.SIGINT, tmp_path / "out", "upscale", base, tmp_path / "out", "--insert", "all")
    done = run("upscale", base, tmp_path / "out", "--insert", "top_half", "--resume", expect=2)
    assert "resume" in done.err and not (tmp_path / "out").exists()


def test_overwrite_replaces_the_whole_folder(run, tiny, tmp_path):
    out = tmp_path / "out"
    run("upscale", tiny, out, "--preset", "stack", "--max-shard-size", "200kB")
    assert len(list(out.glob("model-*"))) > 3
    before = model_bytes(out)
    done = run("upscale", tiny, out, "--preset", "copy_next", expect=2)
    assert "--overwrite" in done.err and model_bytes(out) == before
    run("upscale", tiny, out, "--preset", "copy_next", "--overwrite")
    assert [p.name for p in out.glob("*.safetensors*")] == ["model.safetensors"]


def test_json_pipes_and_progress_goes_to_stderr(run, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("deus_merge.cli.progress.INTERVAL", 0)
    done = run("upscale", tiny, tmp_path / "out", "--json")
    assert done.json()["verification"]["passed"]
    assert json.loads(done.err.splitlines()[1])["event"] == "block done"
    quiet = run("upscale", tiny, tmp_path / "out2", "--quiet")
    assert quiet.out == quiet.err == ""


def test_dry_run_writes_nothing(run, tiny, tmp_path):
    done = run("upscale", tiny, tmp_path / "out", "--dry-run")
    assert "6 -> 9 layers" in done.out
    assert list(tmp_path.iterdir()) == []


def test_a_file_copy_needs_no_torch(tiny, tmp_path):
    recipe = write_recipe(
        tmp_path / "r.yml",
        f"merge_method: passthrough\nslices: [{{sources: [{{model: {tiny}, layer_range: [0, 4]}}]}}]\n",
    )
    probe = (
        "import sys; from deus_merge import api; "
        f"api.merge({str(recipe)!r}, {str(tmp_path / 'out')!r}); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr


def test_inspect(run, tiny, tmp_path):
    facts = run("inspect", tiny, "--json").json()
    assert facts["family"] == "llama" and facts["layers"] == 6 and facts["tied_embeddings"]
    done = run("inspect", tiny, "--similarity", "--plot", tmp_path / "similarity.svg")
    assert "0-1 " in done.out and (tmp_path / "similarity.svg").stat().st_size > 10_000
    rows = run("inspect", tiny, "--similarity", "--json").json()["similarity"]
    for row in rows:
        for role in row["roles"].values():
            assert role["aligned"] > role["plain"] - 1e-6 and role["cost"] > 0


def test_methods_lists_what_is_there(run):
    everything = run("methods", "--json").json()
    assert {"ot_fuse", "passthrough", "linear", "slerp"} <= set(everything["methods"])
    assert {"sinkhorn", "emd", "assignment"} <= set(everything["solvers"])
    assert "restore_norm" in run("methods", "ot_fuse").out
    assert "did you mean" in run("methods", "ot_fus", expect=2).err


def test_demo_tiny(run, tmp_path, tiny):
    done = run("demo", tmp_path / "demo", "--tiny")
    base, deeper = (line for line in done.out.splitlines() if line.strip().startswith(("base:", "up-scaled:")))
    assert base.split(": ")[1] == deeper.split(": ")[1]
    assert "FAILED" not in done.out and "bit for bit" in done.out
    mine = tmp_path / "demo/tiny-opt_deus/trained.pt"
    mine.write_text("mine")
    assert "is not computed again" in run("demo", tmp_path / "demo", "--tiny").err and mine.exists()


@pytest.mark.slow
def test_demo(run, real, tmp_path):
    done = run("demo", real.parent)
    assert "The capital of France is Paris." in done.out and "30 -> 45 layers" in done.out


@pytest.mark.slow
def test_real_text_loss(real):
    """The converted model knows English: the losses of data that this test writes itself."""
    import argparse

    from support import load

    ids = token_ids(real, argparse.__doc__)
    with torch.no_grad():
        out = load(real)(ids).logits[0]
    assert torch.nn.functional.cross_entropy(out[:-1], ids[0, 1:]).item() < 3.5
