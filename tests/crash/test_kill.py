"""A run is killed anywhere: OUT is never half-written, and ``--resume`` ends with the bytes of an undisturbed run."""

from __future__ import annotations

import random
import signal

import pytest

# Kind of run, how it dies, at how many points spread over the run, and at how many of its last steps: 300 in all.
KILLS = [
    ("copies", "kill", 60, 8),
    ("copies", "half", 30, 8),
    ("copies", "cut", 50, 8),
    ("computes", "kill", 16, 0),
    ("computes", "cut", 16, 0),
    ("overwrite", "kill", 8, 32),
    ("overwrite", "cut", 8, 12),
    ("no exchange", "kill", 8, 32),
    ("no exchange", "cut", 8, 12),
]


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "how", "points", "last"), KILLS)
def test_killed_at_any_step(stages, stage, how, points, last):
    stage = stages[stage]
    for at in stage.spread(points, points, last):
        folder = stage.folder()
        ended = stage.run(folder, fault={"how": how, "at": at, "seed": at})
        context = f"{how} at step {at}, {stage.steps[at - 1]}"
        assert ended.code == -signal.SIGKILL or len(ended.steps) < at, context  # threads take turns: steps vary a bit
        stage.check_state(folder, context)
        if at % 4 == 0:  # the resumed run dies, too
            again = random.Random(at).randrange(1, len(stage.steps))
            stage.run(folder, "--resume", fault={"how": how, "at": again, "seed": at})
            context += f", again at {again}"
            stage.check_state(folder, context)
        stage.check_resumes(folder, context)


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "times"), [("copies", 20), ("computes", 20), ("no exchange", 12)])
def test_killed_at_any_time(stages, stage, times):
    stage = stages[stage]
    for i in range(times):
        folder = stage.folder()
        seconds = (i + random.Random(i).random()) / times * stage.seconds * 1.1
        ended = stage.run(folder, seconds=seconds, signal="SIGKILL")
        context = f"killed after {seconds} s"
        assert ended.code in (-signal.SIGKILL, 0), context
        stage.check_state(folder, context)
        stage.check_resumes(folder, context)
