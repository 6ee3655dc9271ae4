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
    found = {
        "before the shards": "open model-00002-of-00007.safetensors",
        "before the first block": "fsync new",
        "half-way": "copy_file_range model-00004-of-00007.safetensors",
        "before the other files": "open config.json",
    }
    at = stage.steps.index(found[when]) + 1
    ended = stage.run(disk, fault={"how": "fill", "at": at})
    told = f"{when}: exit code {ended.code}\n{ended.err}"
    assert ended.code == 1 and "no space left" in ended.err and "make room" in ended.err, told
    assert "Traceback" not in ended.err and not (disk / "out").exists(), told
    if when in ("half-way", "before the other files"):
        assert "--resume" in ended.err, told
        again = stage.run(disk, "--resume")
        assert again.code == 2 and "too little space" in again.err, told
    (disk / "ballast").unlink()
    ended = stage.run(disk, "--resume")
    assert ended.code == 0 and content(disk / "out") == stage.new, told
    assert os.listdir(disk) == ["out"], told
