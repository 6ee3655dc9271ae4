"""What a run leaves alone, and what it leaves to others: modes of files, models' code, files that change under it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fuzz.workshop import CONFIG, TOKENIZER_CONFIG
from safetensors.torch import save_file


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077, 0o027, 0o000])
def test_the_output_has_the_users_umask(fit, workshop, tmp_path, umask):
    before = os.umask(umask)
    try:
        out = tmp_path / "new/out"
        fit("upscale", workshop.root / "base", out, "--preset", "copy_next", "--max-shard-size", "4kB")
        fit("upscale", workshop.root / "base", out, "--preset", "average", "--overwrite")
        fit("upscale", workshop.root / "base", tmp_path / "shards", "--max-shard-size", "4kB")
    finally:
        os.umask(before)
    for folder in (out, tmp_path / "shards"):
        assert folder.stat().st_mode & 0o777 == 0o777 & ~umask
        assert {p.name: p.stat().st_mode & 0o777 for p in folder.iterdir()} == {
            p.name: 0o666 & ~umask for p in folder.iterdir()
        }


def test_a_models_code_is_copied_and_never_run(run, fit, workshop, tmp_path):
    base = workshop.copy("base", tmp_path / "base")
    marker = tmp_path / "marker"
    (base / "evil.py").write_text(f"open({str(marker)!r}, 'w')\nclass Evil: pass\n")
    auto = dict.fromkeys(("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer"), "evil.Evil")
    (base / "config.json").write_text(json.dumps(CONFIG | {"auto_map": auto}))
    tokenizer = TOKENIZER_CONFIG | {"auto_map": {"AutoTokenizer": [None, "evil.Evil"]}}
    (base / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    (tmp_path / "text").write_text("a b c d e f " * 10)
    out = tmp_path / "out"
    done = fit("upscale", base, out, "--preset", "copy_next", "--trust-remote-code")
    assert "--trust-remote-code changes nothing: no code of a model is" in done.err
    fit("verify", out)
    run("verify", out, "--logits", tmp_path / "text", expect=None)
    fit("inspect", base)
    assert (out / "evil.py").read_bytes() == (base / "evil.py").read_bytes()
    assert not marker.exists()


_TRUNCATED = """
import os, sys, torch
from deus_merge.checkpoint import Checkpoint
from deus_merge.cli.failures import report_bus_errors
report_bus_errors()
torch.set_num_threads(2)
tensor = Checkpoint.open(sys.argv[1]).read("w")
os.truncate(sys.argv[1] + "/model.safetensors", 100_000)
print(eval(sys.argv[2])(tensor))
"""


@pytest.mark.parametrize("use", ["lambda t: t.sum()", "lambda t: t.numpy().sum()", "lambda t: (t * 2).shape"])
def test_a_file_that_is_cut_off_while_it_is_mapped_is_reported(tmp_path, use):
    """In the window between the check of the file and the use of its pages the kernel sends a bus error."""
    (tmp_path / "config.json").write_text("{}")
    save_file({"w": torch.ones(1024, 2048)}, tmp_path / "model.safetensors")
    command = [sys.executable, "-c", _TRUNCATED, str(tmp_path), use]
    root = Path(__file__).parents[2]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=60, cwd=root, env=os.environ | {"PYTHONPATH": str(root)}
    )
    assert done.returncode == 2, done
    assert f"error: {tmp_path}/model.safetensors: the file became shorter while it was read" in done.stderr
    assert done.stderr.count("error:") == 1 and done.stdout == ""
