"""benchmarks/inits: a suite on the tiny model through the real command, continued, and its report."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from benchmarks.inits.suites import MODELS, SUITES
from deus_merge.training.comparison.result import LEGEND

ROOT = Path(__file__).parents[2]


def test_a_suite_and_its_report(tmp_path):
    text = tmp_path / "prose.txt"
    text.write_text(
        "\n".join(f"Sentence {i} of a text about the number {i % 7}, at some length." for i in range(20_000))
    )
    arguments = ["tiny", "--suite", "near", "--tokens", "4096", "--seeds", "1", "--init", "llama_pro",
                 "--optimizer", "adamw", "--scratch", tmp_path / "scratch", "--out", tmp_path / "results",
                 "--prose", text, "--docs", text, "--device", "cpu"]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    def run(*more: object) -> str:
        command = [sys.executable, "-m", "benchmarks.inits", *map(str, [*arguments, *more])]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return done.stdout

    run("--budget", "5k")
    report, runs = tmp_path / "RESULTS.md", tmp_path / "results/tiny-near/runs.jsonl"
    assert "Not all runs are done." in report.read_text() and len(runs.read_text().splitlines()) == 1
    run()
    assert len(runs.read_text().splitlines()) >= 3  # rates
    text = report.read_text()
    assert "Not all runs are done." not in text and LEGEND in text and "| llama_pro | top_half | adamw |" in text


def test_options_of_all_suites_are_possible():
    for model in MODELS.values():
        for suite in SUITES.values():
            suite.options(model).check()
