"""Runs that ``--resume`` continues, finds complete, or refuses."""

from __future__ import annotations

import json
import os
import shutil
import signal

import pytest
from stage import content
from support import make_model


@pytest.fixture
def killed(stages, base):
    """A copy of the source, and a run of it that was killed half-way."""
    stage = stages["copies"]
    folder = stage.folder()
    shutil.copytree(base, folder / "base")
    arguments = tuple(folder / "base" if a == base else a for a in stage.arguments)

    def run(*more, **request):
        return stage.warm.run(folder, *arguments, *more, **request)

    ended = run(fault={"at": len(stage.steps) * 2 // 3})
    assert ended.code == -signal.SIGKILL and (folder / ".out.deus-tmp/journal.jsonl").exists()
    yield folder, run
    shutil.rmtree(folder)


def change_a_weight(model) -> None:
    with open(next(model.glob("*00001-of*.safetensors")), "r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))


@pytest.mark.parametrize("changed", ["weights", "time", "config", "another model", "recipe", "seed"])
def test_what_has_changed_is_refused(killed, tmp_path, changed):
    folder, run = killed
    more = ()
    if changed == "weights":
        change_a_weight(folder / "base")
    elif changed == "time":
        os.utime(next((folder / "base").glob("*00001-of*.safetensors")))
    elif changed == "config":
        config = json.loads((folder / "base/config.json").read_text())
        (folder / "base/config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    elif changed == "another model":
        shutil.rmtree(folder / "base")
        make_model(folder / "base", layers=3, seed=1, max_shard_size="60KB")
    else:
        more = {"recipe": ("--insert", "top_half"), "seed": ("--seed", "7")}[changed]
    before = content(folder / ".out.deus-tmp")
    for dry in ((), ("--dry-run",)):
        ended = run("--resume", *more, *dry)
        assert ended.code == 2 and "cannot resume: the interrupted run had" in ended.err
        assert {"config": "plan", "recipe": "plan", "seed": "seed"}.get(changed, "sources") in ended.err
        assert "--overwrite" in ended.err
    assert content(folder / ".out.deus-tmp") == before
    assert run("--overwrite", *more).code == 0
    assert sorted(os.listdir(folder)) == ["base", "out"]


def test_a_source_that_changes_during_the_run(killed, warm):
    folder, run = killed
    stopped = run("--overwrite", fault={"how": "stop", "at": 60})
    assert stopped.code is None
    change_a_weight(folder / "base")
    ended = warm.signal(stopped, "SIGCONT")
    assert ended.code == 3 and "a source has changed during the run" in ended.err and "--overwrite" in ended.err
    assert not (folder / "out").exists()


def test_work_that_was_left_is_not_lost(killed):
    folder, run = killed
    before = content(folder / ".out.deus-tmp")
    for dry in ((), ("--dry-run",)):
        ended = run(*dry)
        assert ended.code == 2 and "an earlier run to this output was interrupted" in ended.err
        assert "continue it with --resume, or start over with --overwrite" in ended.err
    assert content(folder / ".out.deus-tmp") == before


def test_a_finished_output_is_complete(stages, base):
    stage = stages["copies"]
    folder = stage.folder()
    assert stage.run(folder).code == 0
    before = os.stat(folder / "out/deus_merge.json")
    for more in ((), ("--overwrite",), ("--no-verify",), ("--json",)):
        ended = stage.run(folder, "--resume", *more)
        assert ended.code == 0 and "already complete: nothing was left to do" in ended.err
        after = os.stat(folder / "out/deus_merge.json")
        assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
        if more == ("--json",):
            assert json.loads(ended.out)["verification"]["passed"]
    dry = stage.run(folder, "--resume", "--dry-run")
    assert dry.code == 0 and "already complete" in dry.err
    assert stage.run(folder).code == 2  # without --resume it is an output in the way
    for other in (("--seed", "3"), ("--preset", "average")):
        ended = stage.run(folder, "--resume", *other)
        assert ended.code == 2 and "not empty" in ended.err
    weights = next((folder / "out").glob("*00003-of*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    ended = stage.run(folder, "--resume")
    assert ended.code == 3 and "write it again with --overwrite" in ended.err
    assert content(folder / "out") != stage.new
    assert stage.run(folder, "--overwrite").code == 0
    assert content(folder / "out") == stage.new
    shutil.rmtree(folder)


def test_an_output_older_than_its_source_is_not_complete(stages, base):
    stage = stages["copies"]
    folder = stage.folder()
    assert stage.run(folder).code == 0
    os.utime(folder / "out/deus_merge.json", (0, 0))
    ended = stage.run(folder, "--resume")
    assert ended.code == 2 and "not empty" in ended.err
    assert stage.run(folder, "--resume", "--overwrite").code == 0
    (folder / "out/deus_merge.json").write_text("{}")
    assert "nothing to resume: this is a fresh run" in stage.run(folder, "--resume", "--overwrite").err
    assert content(folder / "out") == stage.new
    shutil.rmtree(folder)


@pytest.fixture
def between(stages):
    """A run that was killed when the old folder had lost its name and the new one had not got it yet."""
    stage = stages["no exchange"]
    folder = stage.folder()
    renames = [i for i, step in enumerate(stage.steps, 1) if step.startswith("rename ")]
    ended = stage.run(folder, fault={"at": renames[-1]})
    assert ended.code == -signal.SIGKILL and not (folder / "out").exists()
    assert content(folder / ".out.deus-tmp/old") == stage.old
    yield stage, folder
    shutil.rmtree(folder)


def test_between_two_names_any_run_puts_the_old_folder_back(between):
    stage, folder = between
    for dry in ("--dry-run", "--overwrite"):
        assert stage.warm.run(folder, *stage.arguments, dry).code == (2 if dry == "--dry-run" else 0)
        assert (folder / "out").exists() == (dry == "--overwrite")
    assert content(folder / "out") == stage.new and os.listdir(folder) == ["out"]


def test_between_two_names_a_refused_run_puts_the_old_folder_back(between):
    stage, folder = between
    ended = stage.warm.run(folder, *stage.arguments, "--resume")  # --overwrite was forgotten
    assert ended.code == 2 and "not empty" in ended.err and content(folder / "out") == stage.old
    stage.check_resumes(folder, "")
    folder.mkdir()


def test_a_new_folder_in_between_keeps_the_old_one(between):
    stage, folder = between
    shutil.copytree(stage.before, folder / "out")
    for more in ((), ("--resume",), ("--dry-run",)):
        ended = stage.run(folder, *more)
        assert ended.code == 2 and f"the earlier output is in {folder}/.out.deus-tmp/old" in ended.err
    assert content(folder / ".out.deus-tmp/old") == stage.old
    (folder / ".out.deus-tmp/old").rename(folder / "saved")
    assert stage.run(folder, "--resume").code == 0
    assert content(folder / "out") == stage.new and sorted(os.listdir(folder)) == ["out", "saved"]


def test_a_closed_pipe_stops_no_run(stages):
    stage = stages["copies"]
    folder = stage.folder()
    ended = stage.run(folder, closed="stderr")
    assert ended.code == 0 and content(folder / "out") == stage.new


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as another user")
@pytest.mark.parametrize("what", ["parent", "output", "shared parent"])
def test_folders_of_another_user(stages, what):
    stage = stages["overwrite"]
    folder = stage.folder()
    folder.chmod({"parent": 0o755, "output": 0o777, "shared parent": 0o1777}[what])
    (folder / "out").chmod(0o777 if what == "shared parent" else 0o755)
    for dry in ((), ("--dry-run",)):
        ended = stage.run(folder, *dry, user=65534)
        assert ended.code == 2, ended.err
        assert ("belongs to another user" if what == "shared parent" else "no permission to write in") in ended.err
    assert content(folder / "out") == stage.old and os.listdir(folder) == ["out"]
    shutil.rmtree(folder)
