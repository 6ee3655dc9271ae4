"""Options of recipes/training: interruption, early stop, the search for a rate, data, and all layers."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
from grown import changed, grow
from support import weights
from test_examples import script, texts  # noqa: F401

from deus_merge import training

ROOT = Path(__file__).parents[2]
SMALL = ("--length", 32, "--batch", 2, "--eval-size", 8)


@pytest.fixture(scope="module")
def deeper(tiny, tmp_path_factory):
    return grow(tiny, tmp_path_factory.mktemp("scripts") / "deeper", "copy_next", {"count": 2, "where": "top"})


def losses(done: dict) -> dict[int, float]:
    return {entry["step"]: entry["loss"] for entry in done["log"] if "loss" in entry}


@pytest.mark.parametrize(("name", "options"), [
    ("pretrain", ()),
    ("pretrain", ("--base", "4bit", "--optimizer", "muon")),
    pytest.param("sft", ("--packing",), marks=pytest.mark.slow),
])  # fmt: skip
def test_resumed_as_if_never_stopped(script, deeper, tmp_path, monkeypatch, name, options):  # noqa: F811
    """The losses, the rate and the trained bits; the data does not begin anew. It is stopped behind a checkpoint."""
    pytest.importorskip("trl" if name == "sft" else "datasets")
    data = texts(tmp_path)[name == "sft"]
    if name == "sft":  # read more than once
        data.write_text("\n".join(data.read_text().splitlines()[:11]))
    options = (*SMALL, "--steps", 7, "--lr", 5e-3, "--save-every", 3, "--log-every", 1, "--eval-every", 2, *options)
    whole = script(name, deeper, data, "--out", tmp_path / "whole", *options)
    stop = training.NewLayersCallback.on_step_end

    def interrupt(self, args, state, control, **kwargs):
        stop(self, args, state, control, **kwargs)
        if state.global_step == 5:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training.NewLayersCallback, "on_step_end", interrupt)
        script(name, deeper, data, "--out", tmp_path / "parts", *options)
    assert not (tmp_path / "parts").exists()
    with pytest.raises(SystemExit):  # a second start would mix two trainings
        script(name, deeper, data, "--out", tmp_path / "parts", *options)
    with pytest.raises(SystemExit):  # and so would other options
        script(name, deeper, data, "--out", tmp_path / "parts", *options, "--resume", "--seed", 1)
    parts = script(name, deeper, data, "--out", tmp_path / "parts", *options, "--resume")
    assert losses(parts) == losses(whole) and len(losses(whole)) == 7
    assert (parts["before"], parts["after"]) == (whole["before"], whole["after"]) and whole["after"] < whole["before"]
    assert not changed(weights(tmp_path / "whole"), weights(tmp_path / "parts"))
    assert changed(weights(deeper), weights(tmp_path / "whole")) == set(training.new_parameters(deeper))


def test_stops_early_and_keeps_the_best(script, deeper, tmp_path):  # noqa: F811
    """At a rate that destroys the new layers the loss rises: two evaluations later it stops."""
    options = (*SMALL, "--steps", 30, "--lr", 0.3, "--warmup", 3, "--eval-every", 1, "--patience", 2)
    done = script("pretrain", deeper, texts(tmp_path)[0], "--out", tmp_path / "trained", *options)
    found = [entry["eval_loss"] for entry in done["log"] if "eval_loss" in entry]
    best = found[: done["steps"]].index(min(found))
    assert done["steps"] == best + 1 + 2 < 30 and done["after"] == min(found) < found[done["steps"] - 1]


def test_searches_for_a_rate(script, deeper, tmp_path, capsys):  # noqa: F811
    """From several files of JSON lines, with a column of another name."""
    lines = texts(tmp_path)[0].read_text().split("\n\n")
    for i in range(2):
        rows = (json.dumps({"id": n, "body": text}) for n, text in enumerate(lines[i::2]))
        (tmp_path / f"{i}.jsonl").write_text("\n".join(rows))
    files = (tmp_path / "0.jsonl", tmp_path / "1.jsonl")
    options = (*SMALL, "--column", "body", "--steps", 4, "--search-steps", 84, "--zeroed-lr", 1e-3)
    done = script("pretrain", deeper, *files, "--out", tmp_path / "trained", *options)
    assert "suggested" in capsys.readouterr().out and 1e-5 < done["lr"] < 1 and done["after"] < done["before"]
    assert json.loads((tmp_path / "trained-checkpoints/start.json").read_text())["lr"] == done["lr"]


def test_all_layers_after_the_new_ones(run, script, deeper, tmp_path):  # noqa: F811
    """Continued pre-training of the new layers, then SFT of all: verify and strip know it, and it can grow on."""
    pytest.importorskip("trl")
    text, talks = texts(tmp_path)
    script("pretrain", deeper, text, "--out", tmp_path / "first", *SMALL, "--steps", 3, "--lr", 1e-2)
    options = (*SMALL, "--steps", 6, "--lr", 3e-4, "--all-layers")
    done = script("sft", tmp_path / "first", talks, "--out", tmp_path / "tuned", *options)
    assert done["after"] < done["before"]
    before, after = weights(tmp_path / "first"), weights(tmp_path / "tuned")
    assert set(after) == set(before) and len(changed(before, after)) > len(training.new_parameters(deeper)) + 20
    report = run("verify", tmp_path / "tuned", "--json").json()
    assert report["passed"] and "the base was trained" in json.dumps(report)
    assert run("strip", tmp_path / "tuned", tmp_path / "base", "--json").json()["different"]
    again = grow(tmp_path / "tuned", tmp_path / "again", insert={"after": [0]})
    assert run("verify", again, "--json").json()["passed"]
    assert run("inspect", again, "--json").json()["grown"].endswith("(trained); then 1")


def test_where_norms_stand_behind_the_outputs(script, tmp_path, monkeypatch):  # noqa: F811
    """What began as zeros has a rate of its own there, if nothing else was asked for."""
    import tiny_models
    from support import save_tokenizer, train_tokenizer

    base = tiny_models.make(tmp_path / "base", "gemma2", vocab_size=128)
    save_tokenizer(base, train_tokenizer(size=100), eos_token="</s>")
    out = grow(base, tmp_path / "out", "copy_next", {"count": 1, "where": "top"})
    rates: list[dict] = []
    made = training.optimizer

    def optimizer(*arguments, **settings):
        rates.append({group["name"]: group["lr"] for group in made(*arguments, **settings).param_groups})
        return made(*arguments, **settings)

    monkeypatch.setattr(training, "optimizer", optimizer)
    for more in ((), ("--output-ratio", 0.5), ("--zeroed-lr", 3e-6)):
        folder = tmp_path / f"trained{len(rates)}"
        options = (*SMALL, "--steps", 1, "--lr", 1e-3, *more)
        script("pretrain", out, texts(tmp_path)[0], "--out", folder, *options)
    assert [(r["matrices"], r["zeroed"]) for r in rates] == [(1e-3, 1e-5), (1e-3, 5e-4), (1e-3, 3e-6)]


def shown() -> list[str]:
    """The command lines of the pages and of the scripts themselves."""
    pages = [ROOT / "README.md", ROOT / "docs/training.md", *(ROOT / "recipes/training").glob("*.py")]
    return sorted(
        line.strip()
        for page in pages
        for line in page.read_text().splitlines()
        if line.strip().startswith("python recipes")
    )


@pytest.mark.parametrize("line", shown())
def test_commands_on_the_pages(script, tmp_path, monkeypatch, line):  # noqa: F811
    """Their options are taken, up to where the model is loaded."""
    import shared

    monkeypatch.chdir(tmp_path)
    ran: list[object] = []

    def prepare(options):
        ran.append(options)
        raise KeyboardInterrupt

    monkeypatch.setattr(shared, "prepare", prepare)
    _, path, *arguments = shlex.split(line)
    if Path(path).stem == "sft":
        pytest.importorskip("trl")
    with pytest.raises(KeyboardInterrupt):
        script(Path(path).stem, *arguments)
    assert len(ran) == 1


def test_there_are_such_commands():
    assert {Path(line.split()[1]).stem for line in shown()} == {"pretrain", "sft"} and len(shown()) >= 6


# fmt: off
REFUSED = {
    "no column": (("a.jsonl",), ("--column", "body"), "there is no 'body' in text"),
    "too short": (("short.txt",), (), "held out have no 32 tokens"),
    "two kinds": (("a.jsonl", "short.txt"), (), "files of one kind"),
    "not a file": (("a.jsonl", "missing.txt"), (), "not a file: .*missing.txt"),
}
# fmt: on


@pytest.mark.parametrize("case", REFUSED)
def test_data_that_is_refused(script, deeper, tmp_path, case):  # noqa: F811
    names, options, message = REFUSED[case]
    (tmp_path / "short.txt").write_text("a word\n")
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "a word " * 100}))
    data = [tmp_path / name for name in names]
    with pytest.raises(SystemExit, match=message):
        script("pretrain", deeper, *data, "--out", tmp_path / "trained", *SMALL, "--lr", 1e-3, *options)
    assert not (tmp_path / "trained").exists()
