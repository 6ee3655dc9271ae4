"""``compare`` with unusual models, texts and options: what is measured is right, or one message says what is wrong."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil

import pytest
import torch
import transformers

from deus_merge import api
from deus_merge.core.errors import DeusMergeError
from deus_merge.models.demo import tiny_model
from deus_merge.training.comparison import learner, prefix
from deus_merge.training.comparison import text as texts
from deus_merge.training.comparison.candidates import Candidate, Fixed, Job
from deus_merge.training.comparison.options import Budget, CompareOptions
from deus_merge.training.comparison.result import Comparison
from deus_merge.training.comparison.search import Search
from deus_merge.training.comparison.store import Results
from deus_merge.training.comparison.text import split

SMALL = ["--tokens", 512, "--batch", 2, "--length", 32, "--held-out", 3, "--threads", 1, "--device", "cpu"]
ONE = [*SMALL, "--insert", "{count: 1, where: top}", "--init", "copy_next", "--seeds", 1, "--lr", 1e-3]
CALIBRATED = "calibrated:copy_next"
WORDS = ("the", "ship", "sailed", "past", "a", "quiet", "harbour", "while", "captains", "argued", "about", "salt")
SHAPE = {"vocab_size": 2048, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 4}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    draw = torch.Generator().manual_seed(0)
    lines = [" ".join(WORDS[i] for i in torch.randint(len(WORDS), (12,), generator=draw)) for _ in range(9000)]
    file = tmp_path_factory.mktemp("odd") / "text.txt"
    file.write_text("\n".join(lines))
    return file


def make(folder, config):
    """A model with the tiny model's tokenizer."""
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_model() / name, folder / name)
    return folder


def gpt2():
    assert (config := transformers.GPT2Config(**SHAPE, n_positions=64)).resid_pdrop > 0  # as it is published
    return config


def qwen3_moe():
    return transformers.Qwen3MoeConfig(
        **SHAPE, num_key_value_heads=2, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
        output_router_logits=True, router_aux_loss_coef=0.1,
    )  # fmt: skip


@pytest.mark.parametrize("config", [gpt2, qwen3_moe])
def test_losses_are_those_of_the_text(run, text, tmp_path, monkeypatch, config):
    """Neither dropout nor the term that balances experts is in them, and frozen layers are stored all the same."""
    model, fitted = make(tmp_path / "model", config()), []
    fits = prefix.FrozenPrefix.fits
    monkeypatch.setattr(prefix.FrozenPrefix, "fits", lambda *a: fitted.append(fits(*a)) or fitted[-1])
    run("compare", model, "--text", text, "--out", tmp_path / "out", *ONE, "--precision", "float32")
    (found,) = [json.loads(line) for line in (tmp_path / "out/runs.jsonl").read_text().splitlines()]
    fixed = Fixed(**json.loads((tmp_path / "out/comparison.json").read_text()))
    windows = learner.Windows(Job(Candidate("", "", "adamw"), 0.0, 0, model, (), fixed, tmp_path / "out/work"))
    base = transformers.AutoModelForCausalLM.from_pretrained(model).eval()
    with torch.no_grad():
        for ids, measured in ((windows.held_out, found["initial"]), (windows.training[:2], found["online"][0])):
            logits = base(input_ids=ids).logits[:, :-1]
            expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).item()
            assert measured == pytest.approx(expected, abs=2e-5)
    assert fitted == [True]


def test_hidden_states_are_stored_as_they_are_used(run, tiny, text, tmp_path, monkeypatch):
    """Matrix products of other batches may round differently: the batches are those of the run."""
    seen = []
    hidden = prefix.FrozenPrefix.hidden
    monkeypatch.setattr(
        prefix.FrozenPrefix, "hidden", lambda self, w, batch, file: seen.append(batch) or hidden(self, w, batch, file)
    )
    run("compare", tiny, "--text", text, "--out", tmp_path, *ONE)
    assert seen == [2, 4]
    for columns, whole in (("80", False), ("200", True)):  # finished runs are not run again
        monkeypatch.setenv("COLUMNS", columns)
        done = run("compare", tiny, "--text", text, "--out", tmp_path, *ONE)
        assert ("TFLOP" in done.out) is whole and ("all columns: " in done.err) is not whole
        assert max(map(len, done.out.splitlines())) <= int(columns)
    assert seen == [2, 4]


def test_runs_that_diverged(run, tiny, text, tmp_path):
    """JSON without infinities, now and when the results are read again; a table; no digits of what is unknown."""
    command = ["compare", tiny, "--text", text, "--base-text", text, "--out", tmp_path, *ONE[:-3], 2, "--lr", 1e38]
    for _ in range(2):
        done = json.loads(
            run(*command, "--init", "llama_pro", "--json").out, parse_constant=lambda name: pytest.fail(name)
        )
        assert [row["final"] for row in done["rows"]] == [None, None] and done["rows"][0]["rates"] == {"1e+38": None}
        assert done["rows"][1]["difference"] is None and done["rows"][1]["initial"] > 0
    table = run(*command, "--init", "llama_pro").out
    assert "nan" not in table and "inf" in table


def result(init, lr, seed, final, tflop=1e-7):
    curve = [(0, 5.0), (256, final + 0.1), (512, final)]
    return {"init": init, "insert": '"all"', "optimizer": "adamw", "lr": lr, "seed": seed, "initial": 5.0,
            "final": final, "curve": curve, "tflop": tflop, "trained": 10, "memory": 10, "seconds": 1.0,
            "new_layers": [1]}  # fmt: skip


def test_tables_of_small_and_of_far_results(tmp_path):
    """Computation that is too little to count, factors far from 1, and the rates as the search saw them."""
    one, other = (Candidate(init, '"all"', "adamw") for init in ("llama_pro", "copy_next"))
    runs = [result("llama_pro", 1e-3, seed, 4.0 + seed) for seed in (0, 1)] + [result("llama_pro", 1e-2, 0, 4.5)]
    runs += [result("copy_next", 1e-3, seed, 1.0 - seed, tflop=0.0) for seed in (0, 1)]
    found = Comparison(tmp_path, (one, other), tuple(runs), {}, True)
    assert found.rows[0].rates == {1e-3: 4.0, 1e-2: 4.5}  # of the search's seed
    columns, rows = found.table()
    assert rows[1][columns.index("tokens")].startswith("<0.01")
    assert rows[1][columns.index("at equal FLOPs")].startswith("-4.0")


def test_texts_as_they_come(tmp_path):
    """Each file once, any string of JSON, a byte-order mark; what is no text is refused by its name."""
    lines = tmp_path / "Text.JSONL"
    lines.write_text(
        '\n{"text": "one\u2028line\\u0085"}\n{"text": "half \\ud800"}\n' + json.dumps({"text": "\ud83d\ude00"}),
        encoding="utf-8",
    )
    mark = tmp_path / "mark.txt"
    mark.write_bytes(b"\xef\xbb\xbfmarked")
    (tmp_path / "link.txt").symlink_to(mark)
    found = split([tmp_path, mark, lines])
    whole = found.training + found.held_out
    assert "".join(sorted(whole)).count("marked") == 1 and "\ufeff" not in "".join(whole)
    assert "one\u2028line\u0085\n" in "".join(whole) and "half ?\n" in "".join(whole)
    lines.write_text('\n\n{"text": "good"}\n[1]\n')
    with pytest.raises(DeusMergeError, match="line 4"):
        split([lines])
    mark.write_bytes("two bytes a letter".encode("utf-16"))
    with pytest.raises(DeusMergeError, match="not a text file"):
        split([mark])


def test_calibration_does_not_see_what_is_held_out(run, tiny, text, tmp_path, monkeypatch):
    from deus_merge.training.comparison import growing

    seen = []
    calibrate = growing.calibrate
    monkeypatch.setattr(growing, "calibrate", lambda a, b, text, o: seen.append(text) or calibrate(a, b, text, o))
    run("compare", tiny, "--text", text, "--out", tmp_path, *ONE, "--init", CALIBRATED)
    pieces = split([text])
    assert seen == ["".join(pieces.training)] and pieces.held_out and pieces.held_out[0] not in seen[0]


def test_named_twice_is_once():
    search = Search([Candidate("copy_next", '"all"', "adamw")], 1, (1e-3, 1e-3), 2)
    assert len(search.next_jobs([])) == search.left([]) == 1
    options = CompareOptions(without_growing=("top", "top:3", "top:03", "lora", "all", "all"))
    assert [c.init for c in options.ungrown(3, 5)] == ["top:3", "lora:5", "all"]


def test_a_recipe_that_changed(run, tiny, text, tmp_path):
    """Results of the recipe as it was are not shown as those of the recipe as it is."""
    recipe = tmp_path / "mine.yml"
    recipe.write_text(f"base_model: {tiny}\nupscale: {{preset: llama_pro, insert: {{after: [4]}}}}\n")
    command = ["compare", tiny, "--text", text, "--out", tmp_path / "out", *SMALL, "--seeds", 1, "--lr", 1e-3]
    run(*command, "--init", recipe)
    run(*command, "--init", recipe)
    recipe.write_text(recipe.read_text().replace("[4]", "[3]"))
    assert "the recipe changed since it ran" in run(*command, "--init", recipe, expect=2).err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lr", "nan"], "positive numbers"),
        (["--lr", "inf"], "positive numbers"),
        (["--budget", "10"], "one run at least: 512"),
        (["--length", 300, "--tokens", 4800], "at most 256, the positions of the model"),
        (["--without-growing", "top:7"], "at most 6 layers"),
        (["--without-growing", "lora:\u00b2"], "not a way to train without growing"),
        (["--init", "calibrated:random_zero"], "is not calibrated"),
    ],
)
def test_refused_before_a_byte(run, tiny, text, tmp_path, arguments, message):
    done = run("compare", tiny, "--text", text, "--out", tmp_path / "out", *ONE, *arguments, expect=2)
    assert message in done.err and "Traceback" not in done.err and not (tmp_path / "out").exists()


def test_models_that_cannot_train_so(run, text, tmp_path):
    """An adapter that peft does not make, a calibration without outputs, results in the model's folder: no byte."""
    config = transformers.MambaConfig(vocab_size=2048, hidden_size=32, state_size=4, num_hidden_layers=4)
    model = make(tmp_path / "model", config)
    command = ["compare", model, "--text", text, *ONE]
    assert "no adapter" in run(*command, "--out", tmp_path / "out", "--without-growing", "lora", expect=2).err
    assert "can be calibrated" in run(*command, "--out", tmp_path / "out", "--init", CALIBRATED, expect=2).err
    assert "must not contain each other" in run(*command, "--out", model / "new/out", expect=2).err
    assert not (tmp_path / "out").exists() and not (model / "new").exists()


def test_a_model_through_which_no_gradient_passes(tiny, text, tmp_path, monkeypatch):
    monkeypatch.setattr(learner._Learner, "loss", lambda self, ids: sum(p.sum() * 0 for p in self.model.parameters()))
    options = CompareOptions(("copy_next",), tokens=512, batch=2, length=32, held_out=3, rates=(1e-3,), device="cpu")
    with pytest.raises(DeusMergeError, match="all gradients are zero"):
        api.compare(tiny, tmp_path, text, options)


def test_a_full_disk(tiny, text, tmp_path, monkeypatch):
    """No space for the tokens, none for hidden states: the operating system's error, and no part of a file."""
    found = texts.Tokens(torch.arange(3), torch.arange(3), "f")

    def full(self, data):
        self.touch()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch, pytest.raises(OSError, match="space"):
        patch.setattr(type(tmp_path), "write_bytes", full)
        texts.write_tokens(tmp_path, "model", found)
    assert not list(tmp_path.iterdir())
    sparse = tmp_path / "states.part"
    sparse.write_bytes(b"x" * 9)
    with monkeypatch.context() as patch, pytest.raises(OSError, match="space"):
        patch.setattr(os, "posix_fallocate", lambda *a: (_ for _ in ()).throw(OSError(errno.ENOSPC, "no space left")))
        prefix._reserve(sparse)
    assert not sparse.exists()


def test_results_of_an_earlier_run_that_diverged(tmp_path):
    """null, as JSON writes an infinity, is read as one wherever a loss may stand."""
    line = {**result("copy_next", 1.0, 0, 4.0), "initial": None, "base_before": 3.0, "base_after": None}
    (tmp_path / "runs.jsonl").write_text(json.dumps(line) + "\n")
    (found,) = Results(tmp_path, None).runs
    assert found["initial"] == found["base_after"] == math.inf and found["base_before"] == 3.0


def test_budget_of_tokens_that_fits_one_run():
    CompareOptions(tokens=65_536, budget=Budget(tokens=65_536)).check()
