"""``compare``: real runs on the tiny model through the command line, and the laws of its search and its statistics."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import time

import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deus_merge import api
from deus_merge.core.errors import DeusMergeError
from deus_merge.training.comparison import parse_budget, store
from deus_merge.training.comparison import search as searching
from deus_merge.training.comparison.candidates import Candidate, parse_optimizer
from deus_merge.training.comparison.statistics import at_compute, difference, token_ratio
from deus_merge.training.comparison.text import pieces

SMALL = ["--tokens", 2048, "--batch", 4, "--length", 64, "--held-out", 4, "--threads", 1, "--device", "cpu"]
RATE = ["--lr", 3e-3]
PLACE = ["--insert", "{count: 1, where: top}"]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Prose, unlike the tiny model's text, long enough for a held-out part."""
    file = tmp_path_factory.mktemp("text") / "text.txt"
    words = [
        "the",
        "ship",
        "sailed",
        "past",
        "a",
        "quiet",
        "harbour",
        "while",
        "old",
        "captains",
        "argued",
        "about",
        "salt",
        "and",
        "weather",
    ]
    draw = torch.Generator().manual_seed(0)
    lines = [" ".join(words[i] for i in torch.randint(len(words), (12,), generator=draw)) for _ in range(9000)]
    file.write_text("\n".join(lines))
    return file


def lines_of(folder):
    return [json.loads(line) for line in (folder / "runs.jsonl").read_text().splitlines()]


def timeless(runs):
    return [{k: v for k, v in run.items() if k != "seconds"} for run in runs]


def test_from_the_command_to_the_page(run, tiny, text, tmp_path):
    """Every init trains its new layers only, all see the same windows, and what is there is not run again."""
    command = ["compare", tiny, "--text", text, "--out", tmp_path, *SMALL, *RATE, *PLACE, "--seeds", 2]
    inits = ["--init", "llama_pro", "--init", "random_zero"]
    done = run(*command, *inits, "--base-text", text.parent, "--json").json()
    assert done["complete"] and [row["init"] for row in done["rows"]] == ["llama_pro", "random_zero"]
    runs = lines_of(tmp_path)
    assert sorted((r["init"], r["seed"]) for r in runs) == [
        (i, s) for i in ("llama_pro", "random_zero") for s in (0, 1)
    ]
    by = {(r["init"], r["seed"]): r for r in runs}
    for seed in (0, 1):
        assert by["llama_pro", seed]["initial"] == by["random_zero", seed]["initial"]  # zero outputs: the base's loss
        assert by["llama_pro", seed]["online"][0] == by["random_zero", seed]["online"][0]  # the same first window
    assert by["llama_pro", 0]["initial"] != by["llama_pro", 1]["initial"]  # other windows
    for r in runs:
        assert r["final"] < r["initial"] - 0.2 and r["curve"][-1] == [2048, r["final"]] and len(r["online"]) == 8
        assert r["base_after"] < r["base_before"]  # here it is the same kind of text
        layer = sum(p.numel() for p in reference_layer(tiny).parameters())
        assert r["trained"] == layer and len(r["new_layers"]) == 1
    again = run(*command, *inits, "--base-text", text.parent)
    assert lines_of(tmp_path) == runs and "lr" in again.out and "[1 of" not in again.err
    more = run(*command, *inits, "--init", "copy_next", "--base-text", text.parent, "--json").json()
    assert len(more["rows"]) == 3 and lines_of(tmp_path)[:4] == runs and len(lines_of(tmp_path)) == 6
    table = (tmp_path / "table.md").read_text()
    assert table.count("\n| ") == 4 and "random_zero" in table
    assert all(row["rates"] == {"0.003": by[row["init"], 0]["final"]} for row in done["rows"])  # of the search's seed
    page = (tmp_path / "report.html").read_text()
    assert "random_zero" in page and not re.search(r'(src|href)="http', page)
    settings = more["settings"]
    for name, shown in (("model", tiny.name), ("text", text.name), ("base_text", text.parent.name)):
        assert f'<dd>{shown} <code class="soft">{settings[name]}</code>' in page and more["names"][name] == shown
    assert str(text.parent) not in page


def reference_layer(model):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model).model.layers[0]


def test_first_losses_are_those_of_the_base(run, tiny, text, tmp_path):
    """In float32, computed by transformers itself on the same windows."""
    from transformers import AutoModelForCausalLM

    from deus_merge.training.comparison import learner
    from deus_merge.training.comparison.candidates import Fixed, Job

    run("compare", tiny, "--text", text, "--out", tmp_path, *SMALL, *RATE, *PLACE, "--seeds", 1, "--init", "opt_deus",
        "--precision", "float32")  # fmt: skip
    fixed = Fixed(**json.loads((tmp_path / "comparison.json").read_text()))
    job = Job(Candidate("", "", "adamw"), 0.0, 0, tiny, (), fixed, tmp_path / "work")
    windows = learner.Windows(job)
    both = torch.cat([windows.training, windows.held_out])
    assert len(torch.unique(both, dim=0)) == len(both) == 8 * 4 + 4  # no window twice, none in both parts
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
        expected = model(input_ids=windows.held_out, labels=windows.held_out).loss.item()
    assert lines_of(tmp_path)[0]["initial"] == pytest.approx(expected, abs=2e-5)


def test_stored_hidden_states_change_nothing(run, tiny, text, tmp_path, monkeypatch):
    from deus_merge.training.comparison import learner, prefix

    fitted = []
    fits = prefix.FrozenPrefix.fits
    monkeypatch.setattr(prefix.FrozenPrefix, "fits", lambda *a: fitted.append(fits(*a)) or fitted[-1])
    command = ["compare", tiny, "--text", text, *SMALL, *RATE, *PLACE, "--seeds", 1, "--init", "copy_next"]
    run(*command, "--without-growing", "top:2", "--out", tmp_path / "stored")
    assert fitted == [True, True]
    monkeypatch.setattr(learner, "_largest_file", lambda work: 0)
    run(*command, "--without-growing", "top:2", "--out", tmp_path / "whole")
    assert len(fitted) == 2
    assert timeless(lines_of(tmp_path / "stored")) == timeless(lines_of(tmp_path / "whole"))


def test_stopped_and_continued(run, tiny, text, tmp_path):
    """Half a line, as a killed run leaves it, and a budget: the results are those of one uninterrupted call."""
    command = ["compare", tiny, "--text", text, *SMALL, *RATE, *PLACE, "--seeds", 2]
    inits = ["--init", "llama_pro", "--init", "copy_next"]
    run(*command, *inits, "--out", tmp_path / "whole")
    stopped = run(*command, *inits, "--out", tmp_path / "parts", "--budget", "4096", "--json").json()
    assert not stopped["complete"] and len(lines_of(tmp_path / "parts")) == 2
    file = tmp_path / "parts/runs.jsonl"
    file.write_text(file.read_text() + file.read_text()[:150])
    run(*command, *inits, "--out", tmp_path / "parts", "--budget", "1h")
    assert timeless(lines_of(tmp_path / "parts")) == timeless(lines_of(tmp_path / "whole"))


def test_without_growing(run, tiny, text, tmp_path):
    """What trains is as large as it is said to be, and a Muon of the base's matrices exists, too."""
    from transformers import AutoModelForCausalLM

    command = ["compare", tiny, "--text", text, "--out", tmp_path, *SMALL, *RATE, *PLACE, "--seeds", 1]
    ungrown = [x for what in ("all", "top", "top:3", "lora", "lora:2") for x in ("--without-growing", what)]
    run(*command, "--init", "copy_next", *ungrown, "--optimizer", "muon")
    trained = {r["init"]: r["trained"] for r in lines_of(tmp_path)}
    model = AutoModelForCausalLM.from_pretrained(tiny)
    layer = sum(p.numel() for p in model.model.layers[0].parameters())
    linear = [m for m in model.model.layers.modules() if isinstance(m, torch.nn.Linear)]
    sides = sum(sum(m.weight.shape) for m in linear)
    equal = next(name for name in trained if name.startswith("lora:") and name != "lora:2")
    assert trained == {
        "copy_next": layer, "all": sum(p.numel() for p in model.parameters()), "top:1": layer, "top:3": 3 * layer,
        "lora:2": 2 * sides, equal: int(equal.split(":")[1]) * sides,
    }  # fmt: skip
    assert abs(trained[equal] - layer) <= sides / 2  # of equal size, as far as ranks are whole
    assert all(r["final"] < r["initial"] for r in lines_of(tmp_path))
    assert {r["optimizer"] for r in lines_of(tmp_path)} == {"muon"}


def test_calibration_counts_as_training(run, tiny, text, tmp_path):
    tokens = ["--calibration-tokens", 512]
    command = ["compare", tiny, "--text", text, "--out", tmp_path, *SMALL, *RATE, *PLACE, "--seeds", 1, *tokens]
    run(*command, "--init", "llama_pro", "--init", "calibrated:llama_pro")
    plain, calibrated = lines_of(tmp_path)
    assert calibrated["curve"][0][0] == 512 and len(calibrated["online"]) == 6  # of 8 steps of 256 tokens
    assert calibrated["curve"][-1][0] == plain["curve"][-1][0] == 2048
    assert calibrated["initial"] < plain["initial"] - 0.05


def test_recipes_and_several_workers(run, tiny, text, tmp_path):
    """A recipe's file is an init; the results do not depend on the number of processes."""
    recipe = tmp_path / "mine.yml"
    recipe.write_text(f"base_model: {tiny}\nupscale: {{preset: average_zero, insert: {{after: [1]}}}}\n")
    command = ["compare", tiny, "--text", text, *SMALL, *RATE, "--seeds", 2, "--init", recipe]
    run(*command, "--out", tmp_path / "one")
    run(*command, "--out", tmp_path / "two", "--workers", 2)
    one, two = (sorted(timeless(lines_of(tmp_path / n)), key=lambda r: r["seed"]) for n in ("one", "two"))
    assert one == two and one[0]["new_layers"] == [2] and one[0]["insert"] == ""


def test_workers_end_with_a_killed_command(tiny, text, tmp_path):
    """In the middle of a run, which would keep a GPU's memory until its end."""
    arguments = ["compare", tiny, "--text", text, "--out", tmp_path / "out", "--workers", 2, "--init", "llama_pro"]
    command = [sys.executable, "-m", "deus_merge", *map(str, arguments), "--tokens", "100000", "--seeds", "1"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        workers: list[psutil.Process] = []
        deadline = time.monotonic() + 60
        while not (tmp_path / "out/work/hidden").exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
            workers = psutil.Process(process.pid).children()
        process.kill()
    assert len(workers) >= 2
    assert psutil.wait_procs(workers, timeout=30)[1] == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--init", "llama_por"], "did you mean 'llama_pro'?"),
        (["--init", "opt_deus{reg: [}"], "--init opt_deus{reg: [}"),
        (["--init", "opt_deus{rge: 0.1}"], "did you mean 'reg'?"),
        (["--init", "calibrated:average"], "only outputs that begin as zeros are calibrated"),
        (["--init", "nothing.yml"], "No such file"),
        (["--optimizer", "adam"], "did you mean 'adamw'?"),
        (["--optimizer", "adamw:-1"], "not an optimizer"),
        (["--insert", "{count: 9, where: top}"], "do not fit into"),
        (["--insert", "top_haf"], "did you mean 'top_half'?"),
        (["--without-growing", "half"], "not a way to train without growing"),
        (["--without-growing", "all:3"], "not a way to train without growing"),
        (["--tokens", 100], "at least 8 steps"),
        (["--tokens", 10_000_000], "the training part of the text is too short"),
        (["--held-out", 5000], "the held-out part of the text is too short"),
        (["--lr", 0.0], "not a possible value"),
        (["--seeds", 0], "not a possible value"),
        (["--calibration-tokens", 5], "not a possible value"),
        (["--budget", "soon"], "not a budget"),
        (["--budget", "0min"], "not a budget"),
        (["--text", "/nowhere"], "does not exist"),
        (["--device", "gpu"], "device"),
    ],
)
def test_bad_input(run, tiny, text, tmp_path, arguments, message):
    """One message, and no folder."""
    usual = {"--text": text, "--out": tmp_path / "out", "--tokens": 2048, "--length": 64, "--batch": 4, "--held-out": 4}
    for name, value in zip(arguments[::2], arguments[1::2], strict=True):
        usual[name] = value
    done = run("compare", tiny, *(x for pair in usual.items() for x in pair), expect=2)
    assert message in done.err and "Traceback" not in done.err and not (tmp_path / "out").exists()


def test_folders_of_something_else(run, tiny, text, tmp_path):
    command = ["compare", tiny, *SMALL, *RATE, *PLACE, "--seeds", 1, "--init", "copy_next", "--out", tmp_path / "out"]
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.tex").write_text("years of work")
    assert "other files" in run(*command, "--text", text, expect=2).err
    (tmp_path / "out/thesis.tex").unlink()
    run(*command, "--text", text)
    before = lines_of(tmp_path / "out")
    other = tmp_path / "other.txt"
    other.write_text(text.read_text().replace("salt", "rope"))
    assert "results of other settings" in run(*command, "--text", other, expect=2).err
    assert "batch: 4" in run(*command, "--text", text, "--batch", 2, expect=2).err
    with store.alone(tmp_path / "out"):
        assert "another comparison is running" in run(*command, "--text", text, expect=2).err
    (tmp_path / "out/comparison.json").write_text("[")
    assert "not the settings of a comparison" in run(*command, "--text", text, expect=2).err
    assert lines_of(tmp_path / "out") == before


def test_lines_of_json_are_read_and_checked(run, tiny, text, tmp_path):
    lines = tmp_path / "text.jsonl"
    lines.write_text("\n".join(json.dumps({"text": line}) for line in text.read_text().splitlines()))
    assert "".join(pieces(lines)).split() == text.read_text().split()
    lines.write_text('{"text": "good"}\n{"txt": "bad"}\n')
    command = ["compare", tiny, *SMALL, "--out", tmp_path / "out", "--text", lines]
    assert "text.jsonl, line 2" in run(*command, expect=2).err


def test_a_result_in_a_notebook(tiny, text, tmp_path):
    options = api.CompareOptions(
        ("copy_next",), ({"count": 1, "where": "top"},), tokens=2048, batch=4, length=64, held_out=4, seeds=1,
        rates=(1e-3, 3e-3, 1e38), device="cpu",
    )  # fmt: skip
    seen = []
    found = api.compare(tiny, tmp_path, text, options, on_run=lambda result, left, seconds: seen.append(left))
    assert seen == [2, 1, 0] and found.complete
    (row,) = found.rows
    assert row.lr == 3e-3 and row.bracketed and row.rates[1e38] == math.inf  # a run that diverged is a result
    assert "copy_next" in str(found) and "<table>" in found._repr_html_()
    assert repr(found).endswith(": 1 candidate, 3 runs, complete)")
    assert json.loads((tmp_path / "runs.jsonl").read_text().splitlines()[-1], parse_constant=pytest.fail)


@settings(deadline=None)
@given(st.floats(-5, 0), st.floats(0.5, 4), st.sampled_from([1, 2, 4]), st.integers(1, 4))
def test_searched_rates_bracket_the_best(optimum, width, per_decade, seeds):
    """Whatever the rate of the lowest loss is, the search ends with a worse one on both sides, on the grid; later
    candidates begin there, and every seed runs at the best rate."""
    candidates = [Candidate(init, '"all"', "adamw") for init in ("llama_pro", "copy_next")]
    search, runs = searching.Search(candidates, seeds, None, per_decade), []
    while jobs := search.next_jobs(runs):
        assert len(set(jobs)) == len(jobs)
        candidate, lr, seed = jobs[0]
        loss = 2 + abs(math.log10(lr) - optimum) / width + (0.01 if candidate.init == "copy_next" else 0)
        runs.append({**vars(candidate), "lr": lr, "seed": seed, "final": loss})
    found = searching.by_candidate(runs)
    for candidate in candidates:
        rates, best = found[candidate], searching.best_lr(found[candidate])
        assert len(searching.best_runs(rates)) == seeds
        if len(rates) < 9:
            assert min(rates) < best < max(rates)
            assert abs(math.log10(best) - optimum) <= 0.51 / per_decade
    if len(found[candidates[0]]) < 9:
        assert len(found[candidates[1]]) == 3


@settings(deadline=None)
@given(st.floats(0.05, 1), st.floats(0.2, 5), st.integers(2, 6))
def test_tokens_of_shifted_curves(falls, factor, seeds):
    """Curves 5 - falls log t: needing ``factor`` times the tokens is a shift of the logarithm."""

    def runs(stretch):
        tokens = [0, 64, 128, 256, 512, 1024]
        curves = {s: [(t, 5 + s / 10 - falls * math.log((t or 1) / stretch)) for t in tokens] for s in range(seeds)}
        return {s: {"curve": curve, "final": curve[-1][1], "tflop": 2.0} for s, curve in curves.items()}

    ours, theirs = runs(factor), runs(1.0)
    assert token_ratio(ours, theirs).mean == pytest.approx(factor, rel=1e-6)
    assert difference(ours, theirs).mean == pytest.approx(falls * math.log(factor), abs=1e-9)
    assert at_compute(theirs[0], 1.0) == pytest.approx(5 - falls * math.log(512))  # half of the computation


@settings(deadline=None)
@given(st.text(st.characters(codec="utf-8", exclude_characters="\r\0\ufeff"), max_size=70_000))
def test_pieces_are_the_text(tmp_path_factory, text):
    file = tmp_path_factory.getbasetemp() / "pieces.txt"
    file.write_bytes(text.encode())
    assert "".join(pieces(file)) == text
    assert all(len(piece) < 2 * 16_384 for piece in pieces(file))


@pytest.mark.parametrize(
    ("text", "seconds", "tokens"),
    [("90s", 90, None), ("30min", 1800, None), ("1.5h", 5400, None), ("500k", None, 500_000), ("2M", None, 2_000_000),
     ("2_000_000 tokens", None, 2_000_000), ("4096", None, 4096)],
)  # fmt: skip
def test_budgets(text, seconds, tokens):
    assert (parse_budget(text).seconds, parse_budget(text).tokens) == (seconds, tokens)


@pytest.mark.parametrize("text", ["", "h", "2kh", "-1h", "1 year", "k"])
def test_not_budgets(text):
    with pytest.raises(DeusMergeError):
        parse_budget(text)


def test_optimizers_are_read_as_they_are_written():
    for text in ("adamw", "muon", "adamw:3", "muon:0.5"):
        assert str(parse_optimizer(text)) == text
