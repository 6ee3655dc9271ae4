"""``make gpu``'s script, tried on the CPU with tiny shapes; and what it says where there is no GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.py"


def script(*arguments) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, SCRIPT, *map(str, arguments)], capture_output=True, text=True)


@pytest.mark.slow
def test_the_script_on_the_cpu(tmp_path):
    done = script("--device", "cpu", "--small", "--scratch", tmp_path / "scratch", "--out", tmp_path / "results")
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((tmp_path / "results/gpu.json").read_text())
    figures = {figure["what"]: figure for figure in record["figures"]}
    assert figures["tests/device on cpu: failures"]["ours"] == 0 and int(record["details"]["tests"]["tests"]) > 3
    for case in ("8B pair, opt_deus", "8B pair, opt_deus_paper", "1.1B, ties of two fine-tunes", "1.1B, opt_deus"):
        equal = figures[f"{case}: tensors with the CPU's bytes"]
        assert equal["ours"] == equal["peer"] > 10
        run = record["details"][case]["runs"][0]
        assert all(run[stage] > 0 for stage in ("reading", "computing", "writing", "seconds"))
    assert figures["8B pair, opt_deus_paper: relative difference of transport costs"]["ours"] == 0
    assert "left out for lack of time" not in record["details"]
    table = (tmp_path / "results/GPU.md").read_text()
    assert all(what in table for what in figures) and "device cpu" in table
    assert not (tmp_path / "scratch/gpu-out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu(tmp_path):
    done = script("--scratch", tmp_path / "scratch", "--out", tmp_path)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1 and "needs a CUDA GPU" in done.stderr
    assert not any(tmp_path.iterdir())
