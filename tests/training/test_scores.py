"""Expansion scores of gaps, against models that were grown there, in float64 by autograd."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from closed_form import Whole
from grown import grow
from prose import PROSE
from support import make_model, save_tokenizer, train_tokenizer

from deus_merge import api
from deus_merge.core.tensors import Action
from deus_merge.models.demo import tiny_model
from deus_merge.report.manifest import read_manifest
from deus_merge.training.calibration.options import read_windows

OPTIONS = api.CalibrationOptions(tokens=160, length=16, batch=3, damping=0.05, device="cpu")


def biased(folder: Path) -> Path:
    """Its outputs have biases, which a new layer has at zero."""
    return save_tokenizer(make_model(folder, "llama_bias", layers=4), train_tokenizer())


@pytest.mark.parametrize("build", [tiny_model, biased])
def test_scores_are_those_of_a_new_layer_in_the_gap(tmp_path, build):
    base = build(tmp_path / "base") if build is biased else build()
    seen = []
    scores = api.score_gaps(base, PROSE, OPTIONS, on_gap=seen.append)
    depth = json.loads((base / "config.json").read_text())["num_hidden_layers"]
    assert [score.after for score in scores] == list(range(depth - 1)) and seen == [*reversed(scores)]
    ids = read_windows(base, PROSE, OPTIONS, 2048).ids
    for score in (scores[0], scores[-1]):
        folder = grow(base, tmp_path / f"{score.after}", "copy_next", {"after": [score.after]})
        layer, tensors = score.after + 1, read_manifest(folder).tensors
        zeroed = [n for n, t in tensors.items() if t.action is Action.ZEROS and n.endswith("weight")]
        phi, g = Whole(folder).statistics(layer, zeroed, ids)  # (n, m), (n, d)
        a, b, s = phi.T @ phi / len(phi), g.T @ phi / len(phi), g.T @ g / len(phi)
        for matrix in (a, s):
            matrix += OPTIONS.damping * matrix.trace() / len(matrix) * torch.eye(len(matrix))
        wanted = (torch.linalg.inv(s) @ b @ torch.linalg.inv(a) @ b.T).trace() / len(s)
        assert score.score == pytest.approx(float(wanted), rel=1e-4) and 0 < score.score < 1
        assert score.gradient == pytest.approx(float(g.square().sum(1).mean().sqrt()), rel=1e-4)
    assert len({round(score.score, 5) for score in scores}) == depth - 1


def test_inspect_shows_them(run, tmp_path):
    text = tmp_path / "prose.txt"
    text.write_text(PROSE)
    settings = ("--scores", "--text", text, "--tokens", 256, "--damping", 1)
    found = run("inspect", tiny_model(), *settings, "--json").json()["scores"]
    assert [row["after"] for row in found] == [0, 1, 2, 3, 4]
    shown = run("inspect", tiny_model(), *settings)
    assert "expansion scores of the gaps" in shown.out and f"{found[2]['score']:.4f}" in shown.out
    other = run("inspect", tiny_model(), *settings[:-1], 3, "--json").json()["scores"]
    assert all(high["score"] < low["score"] for high, low in zip(other, found, strict=True))


def single(folder: Path) -> Path:
    return save_tokenizer(make_model(folder, layers=1), train_tokenizer())


def transposed(folder: Path) -> Path:
    gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=8, n_head=2, n_layer=2, vocab_size=128))
    gpt2.save_pretrained(folder)
    return save_tokenizer(folder, train_tokenizer())


REFUSED = {
    "no text": (lambda f: tiny_model(), ("--scores",), ["--scores needs --text"]),
    "one layer": (single, (), ["no gap between layers"]),
    "transposed": (transposed, (), ["the gaps of 'gpt2' cannot be scored", "transposed"]),
    "no tokenizer": (make_model, (), ["there is no tokenizer"]),
    "a missing text": (lambda f: tiny_model(), ("--scores", "--text", "none.txt"), ["--text: the text cannot be read"]),
    "no damping": (lambda f: tiny_model(), ("--damping", 0), ["--damping"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(run, tmp_path, case):
    build, options, reported = REFUSED[case]
    text = tmp_path / "prose.txt"
    text.write_text(PROSE)
    if "--scores" not in options:
        options = ("--scores", "--text", text, *options)
    error = run("inspect", build(tmp_path / "model"), "--tokens", 256, *options, expect=2).err
    assert all(part in error for part in reported), error


def test_a_text_is_for_scores(run):
    assert "--text is for --scores" in run("inspect", tiny_model(), "--text", "none.txt", expect=2).err
