"""Random choices of elements: as often as they should, and independently in every source, tensor and run."""

from __future__ import annotations

import math
import shutil

import pytest
import torch
from safetensors.torch import save_file
from support import make_model, weights, write_recipe

DENSITY = {"a": 0.35, "b": 0.6}
LONG = "model.embed_tokens.weight"  # (5600, 48): more than a run of 2 ** 18 elements
TWINS = ("model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight")


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    """Two fine-tunes whose changes have sizes that tell them apart, alone and added up."""
    root = tmp_path_factory.mktemp("family")
    base = make_model(root / "base", layers=2, vocab_size=5600, hidden_size=48, tied=True)
    generator = torch.Generator().manual_seed(0)
    for name, low in (("a", 0.01), ("b", 0.1)):
        shutil.copytree(base, root / name)
        tuned = {n: x + low * (1 + torch.rand(x.shape, generator=generator)) for n, x in weights(base).items()}
        save_file(tuned, root / name / "model.safetensors", {"format": "pt"})
    return root


@pytest.fixture(scope="module")
def kept(family):
    """For a merge of the two fine-tunes that rescales nothing: name -> which changes of a, and of b, are in it."""

    def call(run, folder, method, *options, seed=0) -> dict[str, dict[str, torch.Tensor]]:
        lines = "".join(
            f"- {{model: {family / m}, parameters: {{weight: 1, density: {d}}}}}\n" for m, d in DENSITY.items()
        )
        text = f"merge_method: {method}\nbase_model: {family / 'base'}\nmodels:\n{lines}"
        text += "parameters: {rescale: false, normalize: false}\n"
        folder.mkdir(exist_ok=True)
        recipe = write_recipe(folder / "recipe.yml", text)
        run("merge", recipe, folder / str(seed), "--seed", seed, "--no-verify", *options)
        base, found = weights(family / "base"), {}
        for name, tensor in weights(folder / str(seed)).items():
            change = tensor - base[name]
            b = change > 0.06  # of a is at most 0.02, of b at least 0.1
            own = weights(family / "b")[name] - base[name]
            a = change - b * own > 0.005
            oracle = sum(m * (weights(family / n)[name] - base[name]) for n, m in (("a", a), ("b", b)))
            torch.testing.assert_close(change, oracle, rtol=0, atol=1e-6)
            found[name] = {"a": a, "b": b}
        return found

    return call


def as_often(mask: torch.Tensor, probability: float) -> None:
    """Independent elements are kept with this probability: five standard deviations, and one unit of 16 bits."""
    share, count = float(mask.double().mean()), mask.numel()
    assert abs(share - probability) < 5 * math.sqrt(probability * (1 - probability) / count) + 2**-16, share


METHODS = ["dare_linear", "dare_ties", "della_linear", "della"]


@pytest.mark.parametrize("method", METHODS)
def test_sources_tensors_and_runs_draw_for_themselves(run, kept, tmp_path, method):
    """With one generator for two sources, or for two tensors, what is kept of one would tell what is kept of the
    other."""
    found = kept(run, tmp_path, method)
    for masks in found.values():
        if masks["a"].numel() < 1000:
            continue
        for source, mask in masks.items():
            as_often(mask, DENSITY[source])
        as_often(masks["a"] & masks["b"], DENSITY["a"] * DENSITY["b"])
    one, two = (found[name]["a"] for name in TWINS)
    as_often(one & two, DENSITY["a"] ** 2)
    first, second = found[LONG]["a"].flatten()[:20_000], found[LONG]["a"].flatten()[-20_000:]
    as_often(first & second, DENSITY["a"] ** 2)
    other = kept(run, tmp_path, method, seed=1)[LONG]["a"]
    spread = 0.15**2 / 3 * 49 / 47 if "della" in method else 0  # variance of the probabilities in a row of 48
    as_often(found[LONG]["a"] & other, DENSITY["a"] ** 2 + spread)


@pytest.mark.parametrize("method", ["della_linear", "della"])
def test_larger_changes_are_kept_more_often(run, kept, family, tmp_path, method):
    """From density - 0.15 for the smallest of a row to density + 0.15 for its largest, in equal steps."""
    found, base = kept(run, tmp_path, method)[LONG], weights(family / "base")[LONG]
    chances, ranked = [], []
    for source, mask in found.items():
        change = (weights(family / source)[LONG] - base).abs()  # (5600, 48)
        order = change.argsort(dim=1)
        by_rank = mask.gather(1, order).double().mean(dim=0)  # (48,)
        chance = DENSITY[source] + torch.linspace(-0.15, 0.15, 48, dtype=torch.float64)  # (48,)
        assert (by_rank - chance).abs().max() < 5 * math.sqrt(0.25 / 5600)
        chances.append(chance)
        ranked.append(mask.gather(1, order))  # (5600, 48)
    as_often(ranked[0] & ranked[1], float((chances[0] * chances[1]).mean()))  # draws are by rank, so also there


@pytest.mark.parametrize("method", METHODS)
def test_the_kept_changes_are_scaled_to_the_sum_of_all(run, family, tmp_path, method):
    text = (
        f"merge_method: {method}\nbase_model: {family / 'base'}\n"
        f"models: [{{model: {family / 'a'}, parameters: {{weight: 1, density: 0.4}}}}]\n"
    )
    run("merge", write_recipe(tmp_path / "recipe.yml", text), tmp_path / "out", "--no-verify")
    base, tuned = (weights(family / m) for m in ("base", "a"))
    for name, tensor in weights(tmp_path / "out").items():
        got, delta = (x.double() - base[name].double() for x in (tensor, tuned[name]))
        assert float(got.abs().sum()) == pytest.approx(float(delta.abs().sum()), rel=1e-3), name
        factors = (got / delta)[got.abs() > 0.005]
        assert (factors / factors.mean() - 1).abs().max() < 1e-3, name
        assert 0.5 < 0.4 * float(factors.mean()) < 2
