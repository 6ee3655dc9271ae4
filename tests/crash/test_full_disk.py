"""A file system that is really full: by another program, while a run is at work."""

from __future__ import annotations

import os
import subprocess

import pytest
from stage import content


@pytest.fixture
def disk(tmp_path):
    """Two megabytes."""
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", tmp_path], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no right to mount: {done.stderr.strip()}")
    yield tmp_path
    subprocess.run(["umount", tmp_path], check=True)


@pytest.mark.parametrize("when", ["before the shards", "before the first block", "half-way", "before the other files"])
def test_filled_up_and_resumed_with_room(stages, disk, when):
    stage = stages["copies"]
    shards = sorted({step.split()[1] for step in stage.steps if step.endswith(".safetensors")})
    found = {
        "before the shards": f"open {shards[1]}",
        "before the first block": "fsync new",
        "half-way": f"copy_file_range {shards[len(shards) // 2]}",
        "before the other files": "open config.json",
    }
    at = stage.steps.index(found[when]) + 1
    ended = stage.run(disk, fault={"how": "fill", "at": at})
    context = f"{when}: exit code {ended.code}\n{ended.err}"
    assert ended.code == 1 and "no space left" in ended.err and "make room" in ended.err, context
    assert "Traceback" not in ended.err and not (disk / "out").exists(), context
    if when in ("half-way", "before the other files"):
        assert "--resume" in ended.err, context
        again = stage.run(disk, "--resume")
        assert again.code == 2 and "too little space" in again.err, context
    (disk / "ballast").unlink()
    ended = stage.run(disk, "--resume")
    assert ended.code == 0 and content(disk / "out") == stage.new, context
    assert os.listdir(disk) == ["out"], context
