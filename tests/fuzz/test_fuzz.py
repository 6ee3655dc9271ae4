"""More than 100 000 hostile cases in each run of the suite; ``python -m tests.fuzz`` goes on with others.

A finding names its target and number: ``python -m tests.fuzz --case TARGET NUMBER`` runs it again.
"""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from .driver import Tally, guarded, run_batch, run_case
from .targets import TARGETS

#: cases of each target: together a good minute and a half of processor time
CASES = {
    "header": 80_000, "index": 16_000, "config": 1_200, "recipe": 1_200, "side_files": 400, "places": 400,
    "whole": 1_500, "merge": 300, "manifest": 300, "modules": 300, "adapter": 400, "pickle": 300,
}  # fmt: skip
BATCHES = [(t, range(i, min(i + 5_000, n))) for t, n in CASES.items() for i in range(0, n, 5_000)]


@pytest.mark.slow
@pytest.mark.parametrize(("target", "numbers"), BATCHES, ids=[f"{t}-{n.start}" for t, n in BATCHES])
def test_mutated_files(workshop, monkeypatch, target, numbers):
    monkeypatch.chdir(workshop.root)
    tally = Tally()
    with guarded():
        found = list(run_batch(workshop, target, numbers, tally))
    assert not found, f"{len(found)} findings, the first {target} {found[0].number}:\n{found[0].problem}"
    assert tally.cases == len(numbers)
    assert tally.passed > len(numbers) // 100  # cases get deep, too


def test_there_are_enough_cases():
    assert CASES.keys() == TARGETS.keys()
    assert sum(CASES.values()) >= 100_000


@pytest.mark.parametrize("target", ["header", "config", "recipe", "whole"])
def test_what_hypothesis_draws(workshop, monkeypatch, target):
    """The same cases, drawn so that a finding shrinks to the few choices it needs."""
    monkeypatch.chdir(workshop.root)

    @settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(st.randoms(use_true_random=False))
    def draw(r):
        _, finding = run_case(workshop, target, r)
        assert finding is None, finding.problem

    with guarded():
        draw()
