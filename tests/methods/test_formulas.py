"""Every method whose result is determined against its published formula, on tensors that take more than one run.

Cuts by rank, sums and rows go across runs, the base model is not the first source, and dtypes and weights are mixed.
"""

from __future__ import annotations

import shutil

import formulas
import pytest
import torch
from safetensors.torch import save_file
from support import make_model, weights, write_recipe

from deus_merge.methods.slerp import arc

LONG = "model.embed_tokens.weight"  # (5600, 48): more than a run of elements, and no run ends with a row by itself
RUN = 1 << 18
CASES = {  # method, parameters for all, weight of each source (the base model has none)
    "linear": ("linear", {}, [0.5, 1.5, -0.4]),
    "linear, a sum": ("linear", {"normalize": False}, [0.5, 0, -0.4]),
    "linear, one scaled": ("linear", {"normalize": False}, [0, 0.5, 0]),
    "linear, balanced weights": ("linear", {}, [0.5, 0.25, -0.75]),
    "linear, no weight": ("linear", {"normalize": False}, [0, 0, 0]),
    "slerp": ("slerp", {"t": 0.3}, None),
    "nuslerp": ("nuslerp", {}, [0.3, 0.6]),
    "nuslerp, balanced weights": ("nuslerp", {}, [0.5, -0.5]),
    "nuslerp by row": ("nuslerp", {"nuslerp_flatten": False}, [0.3, 0.6]),
    "nuslerp by column": ("nuslerp", {"nuslerp_flatten": False, "nuslerp_row_wise": True}, [0.3, 0.6]),
    "multislerp": ("multislerp", {}, [0.2, 0.5, 0.7]),
    "model_stock": ("model_stock", {}, None),
    "model_stock by row": ("model_stock", {"filter_wise": True}, None),
    "task_arithmetic": ("task_arithmetic", {"lambda": 0.7}, [0.5, -0.3, 0.9]),
    "task_arithmetic, a mean": ("task_arithmetic", {"normalize": True}, [0.5, 0.3, 0.9]),
    "task_arithmetic, balanced weights": ("task_arithmetic", {"normalize": True}, [0.5, -0.25, -0.25]),
    "ties": ("ties", {"density": 0.4, "lambda": 1.3}, [0.5, 0.3, 0.9]),
    "ties, one without weight": ("ties", {"density": 0.4, "rescale": True}, [0, 0.3, 0.9]),
    "ties, a sum": ("ties", {"density": 0.4, "normalize": False}, [0.5, -0.3, 0.9]),
    "ties, one alone": ("ties", {"density": 0.4}, [0, 0, 0.9]),
    "breadcrumbs": ("breadcrumbs", {"density": 0.6, "gamma": 0.1, "rescale": True}, [0.5, 0.3, 0.9]),
    "breadcrumbs, few outliers": ("breadcrumbs", {"density": 0.95, "gamma": 0.2}, [0.5, 0.3, 0.9]),
    "breadcrumbs_ties": ("breadcrumbs_ties", {"density": 0.6, "gamma": 0.1}, [0.5, 0.3, 0.9]),
    "sce": ("sce", {"select_topk": 0.3}, None),
    "ram": ("ram", {"epsilon": 0.01}, None),
    "ramplus_tl": ("ramplus_tl", {"epsilon": 0.01, "r": 0.5, "alpha": 1.5}, None),
    "ramplus_tl, bounded": ("ramplus_tl", {"epsilon": 0.01, "r": 0.5, "alpha": 0.2}, None),
    "karcher": ("karcher", {"max_iter": 100, "tol": 1e-9}, None),
    "karcher, one step": ("karcher", {"max_iter": 1, "tol": 1e-9}, None),
    "arcee_fusion": ("arcee_fusion", {}, None),
    "nearswap": ("nearswap", {"t": 0.01}, None),
}
WITHOUT_BASE = {
    "nuslerp": ("nuslerp", {}, [0.3, 0.6]),
    "nuslerp by row": ("nuslerp", {"nuslerp_flatten": False}, [0.3, 0.6]),
    "multislerp": ("multislerp", {}, [0.2, 0.5, 0.7]),
    "karcher": ("karcher", {"max_iter": 100, "tol": 1e-9}, None),
}
AS_SOURCE = ("linear", "karcher")  # to these the base model is a source like the others
COUNTS = {"slerp": 1, "nearswap": 1, "arcee_fusion": 1, "nuslerp": 2}  # models that are not the base; others take three
AT_A_CUT = 2e-5  # share of elements that rounding may move across a cut by a computed rank


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    """A base model and three fine-tunes of it that agree in part, as files of float32."""
    root = tmp_path_factory.mktemp("family")
    base = make_model(root / "base", layers=1, vocab_size=5600, hidden_size=48, tied=True)
    tensors, generator = weights(base), torch.Generator().manual_seed(0)
    shared = {name: torch.randn(x.shape, generator=generator) for name, x in tensors.items()}
    for name in "abc":
        shutil.copytree(base, root / name)
        tuned = {
            key: x + 0.01 * shared[key] + 0.02 * torch.randn(x.shape, generator=generator) for key, x in tensors.items()
        }
        save_file(tuned, root / name / "model.safetensors", {"format": "pt"})
    return root


def merged(run, family, out, models, method, parameters, weight) -> dict[str, torch.Tensor]:
    """A merge of models; of ``weight`` each takes its own, the base model only where it is a source like the others."""
    weighted = [m for m in models if m != "base" or method in AS_SOURCE]
    own = dict(zip(weighted, weight, strict=True)) if weight else {}
    lines = [f"- model: {family / m}\n" + (f"  parameters: {{weight: {own[m]}}}\n" if m in own else "") for m in models]
    text = f"merge_method: {method}\nmodels:\n{''.join(lines)}"
    if "base" in models:
        text += f"base_model: {family / 'base'}\n"
    if parameters:
        text += f"parameters: {{{', '.join(f'{k}: {str(v).lower()}' for k, v in parameters.items())}}}\n"
    out.mkdir(exist_ok=True)
    run("merge", write_recipe(out / "recipe.yml", text), out / "model", "--no-verify")
    return weights(out / "model")


@pytest.mark.parametrize(("case", "with_base"), [*((c, True) for c in CASES), *((c, False) for c in WITHOUT_BASE)])
def test_published_formula(run, family, tmp_path, case, with_base):
    method, parameters, weight = CASES[case]
    count = 2 if method in AS_SOURCE and with_base else COUNTS.get(method, 3)
    models = list("abc"[:count])
    if with_base:
        models.insert(1, "base")
    sources = {m: weights(family / m) for m in models}
    base = sources["base"] if with_base else None
    others = [t for m, t in sources.items() if m != "base" or method in AS_SOURCE]
    before = {path: path.read_bytes() for path in family.glob("*/model.safetensors")}
    ours = merged(run, family, tmp_path, models, method, parameters, weight)
    more = ({"weight": weight} if weight else {}) | parameters
    for name, tensor in ours.items():
        oracle = getattr(formulas, method)(base and base[name], [o[name] for o in others], **more)
        error = (tensor.double() - oracle).abs()
        wrong = int((error > 2e-6 * (1 + oracle.abs())).sum())
        assert wrong <= AT_A_CUT * tensor.numel(), (
            f"{name}: {wrong} of {tensor.numel()}, up to {float(error.max()):.2g}"
        )
    assert ours[LONG].numel() > RUN and RUN % ours[LONG].shape[1]
    assert all(path.read_bytes() == content for path, content in before.items())  # sources are mapped, and only read


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A base model and a fine-tune in float32, and both as files of float64 and float8."""
    root = tmp_path_factory.mktemp("small")
    for seed, name in enumerate(("base", "tuned")):
        folder = make_model(root / name, layers=1, seed=seed)
        tensors = weights(folder)
        for kind, dtype in (("wide", torch.float64), ("narrow", torch.float8_e4m3fn)):
            other = shutil.copytree(folder, root / f"{kind}_{name}")
            cast = {n: (x.double() + 1e-12 * x.double() ** 2).to(dtype) for n, x in tensors.items()}
            save_file(cast, other / "model.safetensors", {"format": "pt"})
    return root


def test_one_source_in_float64_brings_its_digits(run, small, tmp_path):
    ours = merged(run, small, tmp_path, ["base", "wide_tuned"], "linear", {}, [0.3, 0.6])
    base, tuned = weights(small / "base"), weights(small / "wide_tuned")
    for name, tensor in ours.items():
        assert tensor.dtype == torch.float64
        oracle = (0.3 * base[name].double() + 0.6 * tuned[name]) / 0.9
        assert (tensor - oracle).abs().max() < 1e-14, name


@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "ties", "slerp", "nearswap", "model_stock", "sce"])
def test_float8_is_widened_first(run, small, tmp_path, method):
    """Sums do not widen float8, so it is widened before: as if the source had been stored in float32."""
    parameters = {"slerp": {"t": 0.5}, "nearswap": {"t": 0.1}}.get(method, {})
    weight = {"linear": [0.5, 0.6, 0.7], "task_arithmetic": [0.5, 0.7], "ties": [0.5, 0.7]}.get(method)
    found = []
    for kind in ("narrow", "plain"):
        models = [f"{kind}_base", f"{kind}_tuned", "tuned"] if method not in COUNTS else [f"{kind}_base", "tuned"]
        for name in ("base", "tuned") if kind == "plain" else ():
            folder = small / f"plain_{name}"
            if not folder.exists():
                shutil.copytree(small / f"narrow_{name}", folder)
                widened = {n: x.float() for n, x in weights(folder).items()}
                save_file(widened, folder / "model.safetensors", {"format": "pt"})
        text = f"merge_method: {method}\ndtype: float32\nmodels:\n"
        for i, model in enumerate(models):
            own = weight[i if method == "linear" else i - 1] if weight and (method == "linear" or i) else None
            text += f"- {{model: {small / model}{f', parameters: {{weight: {own}}}' if own else ''}}}\n"
        text += f"base_model: {small / models[0]}\n"
        text += "".join(f"parameters: {{{k}: {v}}}\n" for k, v in parameters.items())
        run("merge", write_recipe(tmp_path / "recipe.yml", text), tmp_path / kind, "--no-verify")
        found.append(weights(tmp_path / kind))
    assert all(x.equal(found[1][name]) for name, x in found[0].items())


def test_of_the_smallest_density_one_element_is_left(run, small, tmp_path):
    """As in mergekit; the largest change of each tensor."""
    ours = merged(run, small, tmp_path, ["base", "tuned"], "ties", {"density": 1e-6}, [1.0])
    base, tuned = weights(small / "base"), weights(small / "tuned")
    for name, tensor in ours.items():
        changed = (tensor != base[name]).flatten().nonzero().flatten()
        assert changed.tolist() == [int((tuned[name] - base[name]).abs().argmax())], name
    nothing = merged(run, small, tmp_path / "none", ["base", "tuned"], "ties", {"density": 0}, [1.0])
    assert all(tensor.equal(base[name]) for name, tensor in nothing.items())


@pytest.mark.parametrize("cosine", [0.9999, -0.9999, 1.0, -1.0])
def test_slerp_of_directions_on_one_line_is_the_chord(cosine):
    assert arc(0.3, cosine) == pytest.approx((0.7, 0.3))


@pytest.mark.parametrize("method", ["ties", "sce"])
def test_where_changes_cancel_out_the_sign_is_positive(run, tmp_path, method):
    """Of x and -x the positive one, as in mergekit."""
    model = make_model(tmp_path / "model", layers=1)
    tensors = weights(model)
    for name, factor in (("base", 0), ("plus", 1), ("minus", -1)):
        shutil.copytree(model, tmp_path / name)
        scaled = {key: factor * x for key, x in tensors.items()}
        save_file(scaled, tmp_path / name / "model.safetensors", {"format": "pt"})
    weight = [1.0, 1.0] if method == "ties" else None
    ours = merged(run, tmp_path, tmp_path / "out", ["base", "plus", "minus"], method, {}, weight)
    assert all(tensor.equal(tensors[name].abs()) for name, tensor in ours.items())


def test_directions_that_cancel_out_have_no_mean(run, tmp_path):
    """Of three models multislerp refuses it; two opposite ones are merged by their weights, as in mergekit."""
    tensors = weights(make_model(tmp_path / "x", layers=1))
    for name, factor in (("twice", 2), ("minus", -1)):
        shutil.copytree(tmp_path / "x", tmp_path / name)
        scaled = {key: factor * x for key, x in tensors.items()}
        save_file(scaled, tmp_path / name / "model.safetensors", {"format": "pt"})
    text = "merge_method: multislerp\nmodels:\n"
    models = [f"- {{model: {tmp_path / m}, parameters: {{weight: {w}}}}}\n" for m, w in (("x", 1), ("minus", 2))]
    third = f"- {{model: {tmp_path / 'twice'}, parameters: {{weight: 1}}}}\n"
    said = run("merge", write_recipe(tmp_path / "r.yml", text + "".join(models) + third), tmp_path / "out", expect=2)
    assert "the weighted directions cancel out" in said.err and "choose other weights" in said.err
    equal = "".join(models).replace("weight: 2", "weight: 1")
    run("merge", write_recipe(tmp_path / "r.yml", text + equal), tmp_path / "out", "--no-verify", "--overwrite")
    assert all(not tensor.any() for tensor in weights(tmp_path / "out").values())
