"""mergekit's methods without mergekit: laws, independence of threads, resumed runs; formulas: test_formulas.py."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import make_model, weights, write_recipe

from deus_merge import api
from deus_merge.methods._random import Draws
from deus_merge.methods._ranks import cuts, keys
from deus_merge.methods.karcher import mean_coefficients

TASK_VECTORS = "weight: [0.4, 0.9], density: 0.55"
PARAMETERS = {
    "task_arithmetic": "weight: 0.4",
    "ties": TASK_VECTORS,
    "dare_linear": TASK_VECTORS,
    "dare_ties": TASK_VECTORS,
    "breadcrumbs": f"{TASK_VECTORS}, gamma: 0.1",
    "breadcrumbs_ties": f"{TASK_VECTORS}, gamma: 0.1, rescale: true",
    "della": TASK_VECTORS,
    "della_linear": TASK_VECTORS,
    "linear": "weight: 0.3",
    "multislerp": "weight: 0.3",
    "nuslerp": "weight: 0.5",
    "model_stock": "filter_wise: true",
    "sce": "select_topk: 0.3",
    "ram": "epsilon: 0.01",
    "ramplus_tl": "epsilon: 0.01, r: 1, alpha: 5",
    "karcher": "max_iter: 10",
    "arcee_fusion": "",
    "nearswap": "t: 0.01",
    "slerp": "t: 0.3",
}
RANDOM = ("dare_linear", "dare_ties", "della", "della_linear")
ALONE = ("arcee_fusion", "nearswap", "slerp")


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    """A base model and two others, with a tensor of more than a run of elements."""
    root, shape = tmp_path_factory.mktemp("family"), {"vocab_size": 5600, "hidden_size": 48, "tied": True}
    return [make_model(root / name, layers=2, seed=seed, **shape) for seed, name in enumerate(("base", "a", "b"))]


def merge(run, out, family, method, parameters, *options, count=2):
    base, *others = family
    models = "".join(f"  - model: {m}\n" for m in others[:count])
    text = f"merge_method: {method}\nbase_model: {base}\nmodels:\n{models}"
    text += f"parameters: {{{parameters}}}\n" if parameters else ""
    out.mkdir(exist_ok=True)
    run("merge", write_recipe(out / "recipe.yml", text), out / "model", *options)
    return weights(out / "model")


@pytest.mark.parametrize("method", [*RANDOM, "breadcrumbs_ties", "slerp", "model_stock", "karcher", "ramplus_tl"])
def test_threads_change_nothing(run, tmp_path, family, method):
    """Sums are by rows of elements, and draws are those of the seed, however many threads there are."""
    count = 1 if method in ALONE else 2
    parameters = PARAMETERS[method].replace("filter_wise: true", "filter_wise: false")
    one, two = (
        merge(run, tmp_path / str(n), family, method, parameters, "--threads", n, "--no-verify", count=count)
        for n in (1, 2)
    )
    torch.set_num_threads(1)
    assert all(two[name].equal(tensor) for name, tensor in one.items())


def test_a_model_that_changed_nothing(run, tmp_path):
    """Task vectors of zeros, for every method that has some: the base model comes back."""
    models = [make_model(tmp_path / name, layers=1, seed=0) for name in ("base", "same", "same_too")]
    base = weights(models[0])
    for method in (m for m in PARAMETERS if m not in ("linear", "karcher", "multislerp")):
        count = 1 if method in ALONE else 2
        out = merge(run, tmp_path / method, models, method, PARAMETERS[method], "--no-verify", count=count)
        for name, tensor in out.items():
            torch.testing.assert_close(tensor, base[name], rtol=1e-6, atol=1e-7)


def test_karcher_mean_is_where_the_arcs_balance():
    """At the mean the tangent vectors to the points add up to nothing; two points meet halfway."""
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(4, 50, generator=generator, dtype=torch.float64) + 0.3  # (4, 50)
    points *= torch.tensor([[1.0], [2], [0.5], [3]])
    mean = mean_coefficients(points @ points.T, 200, 1e-13) @ points  # (50,)
    assert float(mean.norm()) == pytest.approx(float(points.norm(dim=1).mean()))
    unit, units = mean / mean.norm(), points / points.norm(dim=1, keepdim=True)
    dots = (units @ unit).clamp(-1, 1)  # (4,)
    logs = (dots.arccos() / (1 - dots**2).sqrt())[:, None] * (units - dots[:, None] * unit)  # (4, 50)
    assert float(logs.sum(dim=0).norm()) < 1e-9
    pair = torch.tensor([[1.0, 0], [0, 1]], dtype=torch.float64)
    torch.testing.assert_close(mean_coefficients(pair, 10, 1e-5), torch.tensor([0.5, 0.5]).double().sqrt())


@settings(deadline=None)
@given(
    st.lists(st.sampled_from([0.0, -0.0, 1e-40, 0.5, -0.5, 1.0, 1.0000001, -3e38, 7.25]), min_size=1, max_size=60),
    st.integers(1, 20),
    st.booleans(),
    st.data(),
)
def test_cuts_are_those_of_a_stable_sort(numbers, length, descending, data):
    values = torch.tensor(numbers)
    ranks = data.draw(st.lists(st.integers(0, len(numbers)), min_size=1, max_size=3))
    order = values.abs().sort(stable=True, descending=descending).indices
    runs = [keys(v, descending=descending) for v in values.split(length)]
    for rank, cut in zip(ranks, cuts(lambda: runs, ranks), strict=True):
        below = cut.begin()
        got = torch.cat([below(r) for r in runs])
        assert sorted(order[:rank].tolist()) == got.nonzero().flatten().tolist()


@pytest.mark.parametrize("probability", [0.0, 1e-5, 0.1, 0.5, 1 - 1e-6, 1.0])
def test_coins_fall_as_often_as_they_should(probability):
    draws = Draws(torch.Generator().manual_seed(3))
    count = sum(int(draws.coins(probability, 999_983).sum()) for _ in range(10))
    # independent coins, and one unit of 16 bits by chance in each of the ten throws
    deviation = (9_999_830 * probability * (1 - probability) + 10 * (999_983 / 65536) ** 2 / 4) ** 0.5
    assert abs(count - 9_999_830 * probability) <= 5 * deviation if 0 < probability < 1 else count in (0, 9_999_830)


def test_random_methods_resume_to_the_same_bytes(run, family, tmp_path):
    """Each draw is of its tensor and source alone, so a block that is computed later is computed alike."""
    whole = merge(run, tmp_path / "whole", family, "dare_ties", TASK_VECTORS, "--seed", 5)
    recipe, out, options = tmp_path / "whole/recipe.yml", tmp_path / "cut", api.RunOptions(seed=5)

    def stop(block, resumed):
        if block.layers == (0,):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        api.merge(recipe, out, options, on_block=stop)
    finished = []
    resume = replace(options, resume=True)
    api.merge(recipe, out, resume, on_block=lambda block, resumed: finished.append(resumed))
    assert finished == [True, True, False, False]
    assert all(tensor.equal(whole[name]) for name, tensor in weights(out).items())


def test_config_holds_the_dtype_of_what_is_written(run, tmp_path):
    """A bfloat16 model merged with a float32 one: float32 tensors, and a config.json that says so."""
    narrow = make_model(tmp_path / "narrow", layers=2, seed=0, dtype=torch.bfloat16)
    wide = make_model(tmp_path / "wide", layers=2, seed=1, dtype=torch.float32)
    for base, models, dtype in ((narrow, (narrow, wide), "float32"), (narrow, (narrow, narrow), "bfloat16")):
        text = f"merge_method: linear\nbase_model: {base}\nmodels:\n" + "".join(
            f"  - {{model: {m}, parameters: {{weight: 0.5}}}}\n" for m in models
        )
        run("merge", write_recipe(tmp_path / "recipe.yml", text), tmp_path / "out", "--overwrite")
        config = json.loads((tmp_path / "out" / "config.json").read_text())
        assert {config.get("dtype"), config.get("torch_dtype")} - {None} == {dtype}
        assert {str(t.dtype) for t in weights(tmp_path / "out").values()} == {f"torch.{dtype}"}


@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "ties", "multislerp"])
def test_a_model_named_twice_counts_twice_everywhere(run, tmp_path, family, method):
    """As if the second mention were of an equal model with another name: in layers, embeddings, norm and head."""
    base, first, second = family
    twin = make_model(tmp_path / "twin", layers=2, seed=1, vocab_size=5600, hidden_size=48, tied=True)
    results = []
    for name, again in (("twice", first), ("apart", twin)):
        weighted = ((first, 0.3), (again, 0.3), (second, 0.4))
        models = "".join(f"  - {{model: {m}, parameters: {{weight: {w}}}}}\n" for m, w in weighted)
        donor = f"base_model: {base}\n" if method != "linear" else ""
        text = f"merge_method: {method}\n{donor}models:\n{models}"
        run("merge", write_recipe(tmp_path / "recipe.yml", text), tmp_path / name)
        results.append(weights(tmp_path / name))
    assert all(results[0][name].equal(tensor) for name, tensor in results[1].items())
    if method == "linear":
        stored = [weights(folder) for folder in (first, second)]
        for name, tensor in results[0].items():
            torch.testing.assert_close(tensor, 0.6 * stored[0][name] + 0.4 * stored[1][name])
