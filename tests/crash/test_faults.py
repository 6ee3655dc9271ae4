"""A full disk, a failing one, Ctrl-C: said in a line or two, with what to do, and nothing is lost or half-done."""

from __future__ import annotations

import os
import random
import re

import pytest
from faults import NEED_SPACE


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "how", "points"),
    [
        ("copies", "enospc", 24),
        ("computes", "enospc", 8),
        ("overwrite", "enospc", 8),
        ("copies", "eio", 32),
        ("computes", "eio", 16),
        ("overwrite", "eio", 24),
        ("no exchange", "eio", 24),
        ("copies", "int", 24),
        ("computes", "int", 16),
        ("no exchange", "int", 24),
    ],
)
def test_stopped_at_any_step(stages, stage, how, points):
    stage = stages[stage]
    for at in stage.spread(points, points, last=points // 2):
        folder = stage.folder()
        ended = stage.run(folder, fault={"how": how, "at": at, "seed": at})
        step = (ended.steps[at - 1 :] or [""])[0]  # threads take turns: steps vary a bit
        context = f"{how} at step {at}, {step}: exit code {ended.code}\n{ended.err}"
        assert "Traceback" not in ended.err, context
        stage.check_state(folder, context)
        if ended.code == 0:  # nothing was left to lose
            renamed = any(s.startswith("rename") for s in ended.steps[: at - 1])
            needy = how != "enospc" or NEED_SPACE & {s.split()[0] for s in ended.steps[at - 1 :]}
            assert renamed or not needy, context
        elif how == "int":
            assert ended.code == 130 and "interrupted" in ended.err, context
        else:
            said = {"enospc": "no space left", "eio": "Input/output error"}[how]
            assert ended.code == 1 and said in ended.err and "error: " in ended.err, context
        resumable = (folder / ".out.deus-tmp/journal.jsonl").exists() and not (folder / "out/deus_merge.json").exists()
        if resumable and stage.old is None:
            assert "--resume" in ended.err and " saved in " in ended.err, context
        assert not (folder / ".out.deus-lock").exists() or "deus-lock" in step, context
        stage.check_resumes(folder, context)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["computes", "no exchange"])
def test_interrupted_at_any_time(stages, stage):
    stage = stages[stage]
    for i in range(12):
        folder = stage.folder()
        seconds = (i + random.Random(i).random()) / 12 * stage.seconds
        ended = stage.run(folder, seconds=seconds, signal="SIGINT")
        context = f"interrupted after {seconds} s: exit code {ended.code}\n{ended.err}"
        # Python itself reports an interrupt that arrives in a destructor, and goes on.
        own = re.sub(r"Exception ignored in.*?KeyboardInterrupt:? *\n", "", ended.err, flags=re.DOTALL)
        assert ended.code in (130, 0) and "Traceback" not in own, context
        assert (" saved in " in ended.err) == (folder / ".out.deus-tmp").exists() or ended.code == 0, context
        stage.check_state(folder, context)
        stage.check_resumes(folder, context)


def test_nothing_is_removed_before_the_new_name_is_on_the_disk(stages):
    for name in ("overwrite", "no exchange"):
        steps = stages[name].steps
        renamed = max(i for i, step in enumerate(steps) if step.startswith("rename"))
        parents = [i for i, step in enumerate(steps) if step.startswith("fsync") and i > renamed]
        removed = next(i for i, step in enumerate(steps) if step.startswith(("unlink", "rmdir")))
        assert len([i for i in parents if i < removed]) == 2  # the folder it came from, and the one it went to


def test_a_second_run_is_refused(stages, warm):
    stage = stages["copies"]
    folder = stage.folder()
    first = stage.run(folder, fault={"how": "stop", "at": len(stage.steps) // 2})
    assert first.code is None
    before = sorted(p for p in folder.rglob("*"))
    for more in ((), ("--resume",), ("--overwrite",), ("--dry-run",)):
        second = stage.run(folder, *more)
        assert second.code == 2 and "another run is writing to this folder" in second.err
        assert f"process {first.pid} on " in second.err
    assert sorted(p for p in folder.rglob("*")) == before
    assert warm.signal(first, "SIGCONT").code == 0
    assert os.listdir(folder) == ["out"]


def test_a_dead_runs_lock_is_no_lock(stages, warm):
    stage = stages["copies"]
    folder = stage.folder()
    first = stage.run(folder, fault={"how": "stop", "at": len(stage.steps) // 2})
    warm.signal(first, "SIGKILL")
    assert (folder / ".out.deus-lock").read_text().startswith(f"process {first.pid} ")
    stage.check_resumes(folder, "")
