"""`inspect --similarity`: what the table says, and the sentence under it."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import make_model
from tiny_models import shared


def like_neighbours(folder, noise: float):
    """A model whose layers are the first one with neurons in another order, and noise."""
    make_model(folder, layers=3)
    tensors = load_file(folder / "model.safetensors")
    for layer in (1, 2):
        order = torch.randperm(48, generator=torch.Generator().manual_seed(layer))
        for name in [name for name in tensors if name.startswith("model.layers.0.")]:
            values = tensors[name]
            if "gate" in name or "up" in name:
                values = values[order]
            target = name.replace("layers.0", f"layers.{layer}")
            tensors[target] = values + layer * noise * torch.randn(values.shape)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def table(text: str) -> dict[str, list[str]]:
    lines = text[text.index("layers  before") :].split("\n\n")[0].splitlines()
    return {line.split()[0]: line.split()[1:] for line in lines}


def test_neighbours_that_are_alike(run, tmp_path):
    done = run("inspect", like_neighbours(tmp_path / "model", 0.02), "--similarity")
    found = table(done.out)
    assert found["layers"] == ["before", "after", "q", "k", "v", "o", "gate", "up", "down"]
    before, after, q, *_, gate, _up, _down = map(float, found["0-1"][:9])
    assert before < 0.8 < after and q > 0.9 and gate > 0.9
    told = " ".join(done.out.split())
    assert "are more alike than random matrices (+0.9" in told and "keeps what both have" in told
    assert "Most alike are layers 0-1, least 1-2. " in told and told.endswith("deus-merge compare measures it.")


def test_random_layers_are_as_alike_as_chance(run, tmp_path):
    base = make_model(tmp_path / "model", layers=3)
    done = run("inspect", base, "--similarity")
    found = table(done.out)
    assert float(found["0-1"][1]) > 0.2  # an assignment finds this much anywhere
    assert "are as alike as random matrices" in done.out and "close to neither" in done.out
    assert float(found["chance"][0]) == pytest.approx(float(found["0-1"][1]), abs=0.05)
    rows = run("inspect", base, "--similarity", "--json").json()["similarity"]
    assert {f"{role['chance']:+.2f}" for role in rows[0]["roles"].values()} == set(found["chance"][1:])
    assert all(row["roles"]["q"]["chance"] == rows[0]["roles"]["q"]["chance"] for row in rows)


def test_many_matrices_are_in_several_tables(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    model = shared("deepseek_v3")
    done = run("inspect", model, "--similarity")
    roles = {
        role for row in run("inspect", model, "--similarity", "--json").json()["similarity"] for role in row["roles"]
    }
    part = done.out[done.out.index("cosine of rows") :]
    heads = [line.split()[1:] for line in part.splitlines() if line.startswith("layers ")]
    assert len(heads) > 1 and {name for head in heads for name in head} - {"before", "after"} == roles
    assert max(map(len, part.splitlines())) <= 80


def test_a_single_layer(run, tmp_path):
    done = run("inspect", make_model(tmp_path / "model", layers=1), "--similarity")
    assert "one layer has no neighbours to compare" in done.out
