"""Our tensors beside mergekit 0.1.5's: equal where a merge is determined, of the same law where it is drawn.

Float32 to 1e-6, of the element or (where a sum cancels) of the tensor's root mean square; bfloat16 to one unit in the
last place.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from cases import DRAWN, EQUAL, FAMILIES, NOT_QWEN2, RANKED, REFUSED, SEEDS, STORED, TOKENIZERS, Drawn, drawn
from support import tokens, weights, write_recipe

TOLERANCE = 1e-6


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], tied: dict[str, int] | None = None) -> None:
    """Every element, but for ``tied[name]`` of a tensor at most."""
    assert ours.keys() == theirs.keys()
    for name, their in theirs.items():
        our = ours[name]
        assert our.dtype == their.dtype and our.shape == their.shape, name
        size = their.double().square().mean().sqrt()  # ()
        slack = TOLERANCE * (their.double().abs() + size)
        if their.dtype == torch.bfloat16:
            slack = slack.maximum(places(their))
        error = (our.double() - their.double()).abs()
        wrong = int((error > slack).sum())
        assert wrong <= (tied or {}).get(name, 0), (
            f"{name}: {wrong} of {error.numel()}, up to {float((error / slack).max()):.3g} times too far"
        )


def places(values: torch.Tensor) -> torch.Tensor:
    """One unit in the last place of bfloat16 values."""
    _, exponent = torch.frexp(values.double())
    return torch.ldexp(torch.ones_like(values, dtype=torch.float64), exponent - 8)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("case", EQUAL)
def test_equal(run, answers, checkpoints, tmp_path, case, family):
    answer = answers[family, case]
    assert answer.error is None, answer.error
    run("merge", answer.recipe, tmp_path / "out", "--quiet")
    tied = ties(checkpoints[family]) if case.startswith(RANKED) and FAMILIES[family][0] == "bfloat16" else None
    same(weights(tmp_path / "out"), weights(answer.out), tied)


def ties(models: dict[str, Path]) -> dict[str, int]:
    """How many elements of each tensor a cut by rank can leave undecided: the largest class of equal changes."""
    base, found = weights(models["base"]), {}
    for tuned in (weights(models[m]) for m in "abc"):
        for name, tensor in tuned.items():
            changes = (tensor.double() - base[name].double()).abs()
            _, counts = changes[changes > 0].unique(return_counts=True)
            found[name] = found.get(name, 0) + int(counts.max() if len(counts) else 0)
    return found


@pytest.mark.parametrize(
    ("family", "case"), [(f, c) for f in FAMILIES for c in TOKENIZERS if f == "llama" or c not in NOT_QWEN2]
)
def test_vocabularies(run, answers, speakers, tmp_path, case, family):
    """The same tokens with the same rows. mergekit gives pieces that only other models have ids in random order."""
    answer = answers[family, "tokenizer", case]
    assert answer.error is None, answer.error
    run("merge", answer.recipe, tmp_path / "out", "--quiet")
    our, their = tokens(tmp_path / "out"), tokens(answer.out)
    assert our.keys() == their.keys() and sorted(our.values()) == sorted(their.values())
    fixed = our.keys() if "model" in case else tokens(speakers[family]["base"]).keys()
    if answer.recipe.read_text().count("{model:") == 2:  # mergekit takes three models in random order
        fixed |= {token for token in our if token.startswith("<")}
    assert {t: i for t, i in our.items() if t in fixed} == {t: i for t, i in their.items() if t in fixed}
    sizes = [json.loads((out / "config.json").read_text())["vocab_size"] for out in (tmp_path / "out", answer.out)]
    assert sizes[0] == sizes[1]
    order = torch.arange(sizes[0])  # (rows,): their row for each of ours
    order[list(our.values())] = torch.tensor([their[t] for t in our])
    theirs = {n: t[order] if len(t) == sizes[0] else t for n, t in weights(answer.out).items()}
    same(weights(tmp_path / "out"), theirs)


@pytest.mark.parametrize("case", STORED)
def test_equal_in_the_stored_dtype(run, answers, tmp_path, case):
    """Where mergekit widens bfloat16 itself, it need not be told to."""
    answer = answers["stored dtype", case]
    run("merge", answer.recipe, tmp_path / "out", "--quiet")
    same(weights(tmp_path / "out"), weights(answer.out))


@pytest.mark.parametrize("case", REFUSED)
def test_refused(run, answers, tmp_path, case):
    """Recipes that stop mergekit stop us, before anything is read."""
    answer = answers["refused", case]
    assert answer.error is not None
    assert REFUSED[case][1] in run("merge", answer.recipe, tmp_path / "out", expect=2).err


@pytest.mark.parametrize("case", DRAWN)
def test_drawn(run, answers, checkpoints, tmp_path, case):
    """Draws differ between the tools; what is kept, how it is scaled, and the mean do not."""
    models = checkpoints["llama"]
    base, tuned = weights(models["base"]), weights(models["a"])
    recipe = write_recipe(tmp_path / "recipe.yml", drawn(DRAWN[case]).format(**models))
    ours = []
    for seed in SEEDS:
        run("merge", recipe, tmp_path / str(seed), "--seed", seed, "--quiet")
        ours.append(weights(tmp_path / str(seed)))
    run("merge", recipe, tmp_path / "again", "--seed", 1, "--quiet")
    assert all(tensor.equal(ours[1][name]) for name, tensor in weights(tmp_path / "again").items())
    assert any(not tensor.equal(ours[1][name]) for name, tensor in ours[0].items())
    for made in (ours, [weights(answers[case, seed].out) for seed in SEEDS]):
        _law(DRAWN[case], base, tuned, made)


def _law(case: Drawn, base: dict, tuned: dict, made: list[dict]) -> None:
    surplus, variance = 0.0, 0.0
    for result in made:
        for name, tensor in result.items():
            delta = tuned[name].double() - base[name].double()
            got = tensor.double() - base[name].double()
            told = delta.abs() > 1e-4  # of smaller changes, rounding leaves little to see
            kept = told & (got.abs() > 1e-5)
            chance = _chances(case, delta)
            surplus += float((kept.double() - chance)[told].sum())
            variance += float((chance * (1 - chance))[told].sum())
            if "rescale: false" in case.settings:
                assert torch.allclose(got[kept], delta[kept], atol=1e-6), name
            elif kept.any():  # the sum of magnitudes is that of the whole task vector, by one factor for all
                assert float(got.abs().sum()) == pytest.approx(float(delta.abs().sum()), rel=1e-4), name
                factors = got[kept] / delta[kept]
                assert (factors / factors.mean() - 1).abs().max() < 1e-2, name
    assert variance > 1000  # enough to tell
    assert abs(surplus) < 5 * math.sqrt(variance), surplus / math.sqrt(variance)


def _chances(case: Drawn, delta: torch.Tensor) -> torch.Tensor:
    """How likely each element is to be kept: alike, or by the rank of its magnitude in its row."""
    if case.method.startswith("dare"):
        return torch.full_like(delta, case.density)
    rows = delta.abs() if delta.ndim > 1 else delta.abs()[None]  # (rows, d)
    rank = rows.argsort(dim=1).argsort(dim=1) / (rows.shape[1] - 1)  # (rows, d), 0 to 1
    return (case.density + case.epsilon * (2 * rank - 1)).view_as(delta)
