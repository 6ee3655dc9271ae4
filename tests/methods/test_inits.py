"""benchmarks/inits: the tiny model through the real command, and what its figures mean."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.inits import statistics
from benchmarks.inits.inits import INITS, new_positions
from benchmarks.inits.leads import ALL
from benchmarks.inits.places import needed, places
from benchmarks.inits.training import Job, Scratch, Setting, run
from deus_merge import api
from deus_merge.models import demo as demo_models

ROOT = Path(__file__).parents[2]
PROSE = "\n".join(
    f"Sentence {i} of a text about the number {i % 7}, which is told at some length." for i in range(60_000)
)


@pytest.fixture(scope="module")
def setting(tmp_path_factory) -> Setting:
    """The tiny model learns a made-up text in four steps."""
    text = tmp_path_factory.mktemp("text") / "prose.txt"
    text.write_text(PROSE)
    return Setting(
        "tiny", str(demo_models.tiny_model()), (str(text),), (str(text),), "base", "text", steps=4, held_out=2, points=2
    )


@pytest.fixture(scope="module")
def scratch(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("inits")


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_every_init_trains_its_new_layers(name, setting, scratch):
    """Inits whose outputs are zero (or cancel) begin at the base's loss; every init learns."""
    result = run(Job(setting, name, 3e-3, 0), ALL[name], scratch)
    base = base_loss(setting, scratch)
    keeps = name not in ("average", "lesa", "solar", "stack", "split") and not name.startswith("outputs")
    assert (abs(result["initial"] - base) < 2e-3) == keeps
    assert result["final"] < result["initial"]
    assert [tokens for tokens, _ in result["curve"]] == [0, 1024, 2048] and len(result["online"]) == 4


def base_loss(setting: Setting, scratch: Path, without: int | None = None) -> float:
    """Of the base model (without one of its layers) on the held-out windows of seed 0, by transformers."""
    from transformers import AutoModelForCausalLM

    ids = Scratch(scratch, setting).windows("text", 0)["held_out"]
    model = AutoModelForCausalLM.from_pretrained(setting.folder, dtype=torch.float32)
    if without is not None:
        del model.model.layers[without]
        model.config.num_hidden_layers -= 1
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        return float(np.mean([model(input_ids=w[None], labels=w[None], use_cache=False).loss.item() for w in ids]))


@pytest.mark.slow
def test_a_run_is_repeatable_and_seeds_differ(setting, scratch):
    one, same, other = (run(Job(setting, "random_zero", 3e-3, s), INITS["random_zero"], scratch) for s in (1, 1, 2))
    assert one["curve"] == same["curve"] and one["online"] == same["online"]
    assert one["online"] != other["online"]


@pytest.mark.slow
def test_training_windows_are_not_held_out(setting, scratch):
    windows = Scratch(scratch, replace(setting, steps=64)).windows("text", 3)
    assert len(windows["train"]) == 128
    assert not {tuple(w) for w in windows["train"].tolist()} & {tuple(w) for w in windows["held_out"].tolist()}


def test_copies_by_passthrough_are_the_preset(setting, tmp_path):
    """`copy_next_halved` differs from the preset `copy_next` by its factors alone."""
    from safetensors.torch import load_file

    for name in ("copy_next", "copy_next_halved"):
        api.merge(INITS[name].build(setting.folder, "top_half"), tmp_path / name)
    plain, halved = (load_file(tmp_path / name / "model.safetensors") for name in ("copy_next", "copy_next_halved"))
    new = tuple(f"model.layers.{layer}." for layer in new_positions(setting.folder, "top_half"))
    for name, tensor in plain.items():
        factor = 0.5 if name.startswith(new) and any(w in name for w in ("q_", "k_", "v_", "gate_", "up_")) else 1.0
        assert torch.equal(halved[name], tensor * factor), name


def test_places_are_among_the_gaps_and_differ(setting, scratch):
    """The tiny model has 6 layers, 5 gaps: a quarter is one of them."""
    found = places(setting, Scratch(scratch, setting))
    counts = {name: len(new_positions(setting.folder, insert)) for name, insert in found.items()}
    assert counts == dict.fromkeys(found, 1) | {"all": 5, "bottom_half": 3}
    losses = needed(setting, Scratch(scratch, setting))
    assert losses == pytest.approx([base_loss(setting, scratch, without=i + 1) for i in range(5)], abs=1e-3)
    assert found["most_needed"] == {"after": [losses.index(max(losses))]}
    assert found["least_needed"] == {"after": [losses.index(min(losses))]}


def command(*arguments: str) -> subprocess.CompletedProcess:
    call = [sys.executable, "-m", "benchmarks.inits", *arguments]
    return subprocess.run(call, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, text=True, capture_output=True)


@pytest.mark.slow
def test_the_command_sweeps_resumes_and_reports(setting, tmp_path):
    paths = [x for option in ("scratch", "out", "pictures") for x in (f"--{option}", str(tmp_path))]
    how = [*paths, "--steps", "4", "--seeds", "2", "--prose", *setting.text, "--code", *setting.text]
    two = [*how, "--init", "copy_next", "--init", "opt_deus"]
    done = command("tiny", *two)
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "tiny.jsonl").read_text().splitlines()
    runs = [json.loads(line) for line in lines]
    assert {r["init"] for r in runs} == {"copy_next", "opt_deus"} and {r["seed"] for r in runs} == {0, 1}
    for rates in statistics.by_init(runs).values():
        best, swept = statistics.best_lr(rates), sorted(lr for lr, of in rates.items() if 0 in of)
        assert len(swept) >= 3 and (swept[0] < best < swept[-1] or len(swept) >= 7)
    (tmp_path / "tiny.jsonl").write_text("\n".join(lines)[:-20])  # as if it had been stopped while it wrote
    again = command("tiny", *two)
    assert again.returncode == 0, again.stderr
    assert len((tmp_path / "tiny.jsonl").read_text().splitlines()) == len(lines)
    table = (tmp_path / "RESULTS.md").read_text()
    assert "best peer: `copy_next`" in table and "**opt_deus**" in table
    assert (tmp_path / "inits-tiny.svg").stat().st_size > 10_000


# ------------------------------------------------------------------------------------------------- what figures mean


def curve(slope: float, factor: float) -> dict[int, dict]:
    """A run of one seed that begins at a loss of 6."""
    points = [(0, 6.0), *((t, 5 - slope * math.log(t / factor)) for t in (256, 512, 1024, 2048))]
    return {0: {"curve": points, "final": points[-1][1]}}


@given(st.floats(0.01, 1.0), st.floats(0.2, 5.0))
def test_token_ratio_of_a_curve_that_is_late_is_how_late_it_is(slope, factor):
    """Loss = 5 - slope log(tokens): a curve that needs ``factor`` times the tokens everywhere."""
    theirs, ours = (curve(slope, f) for f in (1.0, factor))
    assert statistics.slope(theirs) == pytest.approx(slope)
    assert statistics.token_ratio(ours, theirs).mean == pytest.approx(factor)
    assert statistics.token_ratio(theirs, ours).mean == pytest.approx(1 / factor)


def test_interval_is_students():
    mean, low, high = statistics.interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert (mean, low, high) == pytest.approx((3.0, 3 - 1.963, 3 + 1.963), abs=1e-3)
    assert math.isnan(statistics.interval([1.0]).low)


def test_difference_is_taken_seed_by_seed():
    ours, theirs = ({s: {"final": 10.0 * s + d} for s in range(5)} for d in (0.0, 0.5))
    assert statistics.difference(ours, theirs) == pytest.approx((-0.5, -0.5, -0.5))
