"""The tensor-wise methods and ot_fuse's arithmetic against float64 oracles written here, through the command line."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from scipy.special import logsumexp
from support import load, logits, make_model, weights, write_recipe


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Two models of one shape."""
    folder = tmp_path_factory.mktemp("pair")
    return make_model(folder / "a", seed=1), make_model(folder / "b", seed=2)


def merged(run, tmp_path, text: str) -> dict[str, torch.Tensor]:
    run("merge", write_recipe(tmp_path / "recipe.yml", text), tmp_path / "out")
    load(tmp_path / "out")
    return weights(tmp_path / "out")


def close(ours: torch.Tensor, oracle: torch.Tensor, limit: float = 1e-6) -> None:
    error = (ours.double() - oracle).norm() / oracle.norm()
    assert error <= limit, error


def test_linear(run, pair, tmp_path):
    a, b = map(weights, pair)
    ours = merged(
        run,
        tmp_path,
        f"""
merge_method: linear
models:
  - {{model: {pair[0]}, parameters: {{weight: 0.3}}}}
  - model: {pair[1]}
    parameters: {{weight: [{{filter: mlp, value: [0.1, 0.7]}}, {{value: 0.5}}]}}
""",
    )
    for name, made in ours.items():
        layer = int(name.split(".")[2]) if ".layers." in name else None
        weight = 0.1 + 0.6 * layer / 3 if "mlp" in name else 0.5
        oracle = (0.3 * a[name].double() + weight * b[name].double()) / (0.3 + weight)
        close(made, oracle)


def test_slerp(run, pair, tmp_path):
    a, b = map(weights, pair)
    ours = merged(
        run,
        tmp_path,
        f"""
merge_method: slerp
base_model: {pair[1]}
slices:
  - sources:
      - {{model: {pair[0]}, layer_range: [0, 4]}}
      - {{model: {pair[1]}, layer_range: [0, 4]}}
parameters:
  t: [{{filter: self_attn, value: [0, 0.5, 1]}}, {{value: 0.25}}]
""",
    )
    for name, made in ours.items():
        x, y = (w[name].double().flatten().numpy() for w in (b, a))  # from the base to the other
        t = np.interp(int(name.split(".")[2]) / 3, [0, 0.5, 1], [0, 0.5, 1]) if "self_attn" in name else 0.25
        theta = np.arccos(np.dot(x, y) / np.linalg.norm(x) / np.linalg.norm(y))
        line = np.cos(theta) > 0.9995  # nearly one direction: the chord
        wx, wy = (1 - t, t) if line else (np.sin((1 - t) * theta) / np.sin(theta), np.sin(t * theta) / np.sin(theta))
        close(made.flatten(), torch.from_numpy(wx * x + wy * y))


def test_passthrough_scale(run, pair, tmp_path):
    a = weights(pair[0])
    ours = merged(
        run,
        tmp_path,
        f"""
merge_method: passthrough
slices:
  - sources: [{{model: {pair[0]}, layer_range: [0, 2]}}]
  - sources:
      - model: {pair[0]}
        layer_range: [1, 4]
        parameters:
          scale:
            - {{filter: o_proj, value: 0}}
            - {{filter: down_proj, value: [0.5, 1.5]}}
            - value: 1
""",
    )
    assert load(tmp_path / "out").config.num_hidden_layers == 5
    for out_layer, layer, scale in ((0, 0, 1.0), (1, 1, 1.0), (2, 1, 0.5), (3, 2, 1.0), (4, 3, 1.5)):
        names = [f"model.layers.{i}.mlp.down_proj.weight" for i in (out_layer, layer)]
        close(ours[names[0]], scale * a[names[1]].double())
        o = ours[f"model.layers.{out_layer}.self_attn.o_proj.weight"]
        assert o.any() == (out_layer < 2)
    origins = json.loads((tmp_path / "out/deus_merge.json").read_text())["tensors"]
    assert origins["model.layers.3.mlp.down_proj.weight"]["action"] == "copy"  # a factor of 1 is a file copy
    assert origins["model.layers.2.self_attn.o_proj.weight"]["action"] == "zeros"


def test_embeddings_and_head_of_a_frankenmerge(run, pair, tmp_path):
    """Without base_model the first model named gives them, and the run says so where that may surprise."""
    text = f"""
merge_method: passthrough
slices:
  - sources: [{{model: {pair[0]}, layer_range: [0, 3]}}]
  - sources: [{{model: {pair[1]}, layer_range: [2, 4]}}]
"""
    a, b = map(weights, pair)
    ours = merged(run, tmp_path, text)
    assert ours["lm_head.weight"].equal(a["lm_head.weight"])
    assert ours["model.layers.4.mlp.up_proj.weight"].equal(b["model.layers.3.mlp.up_proj.weight"])
    done = run("plan", tmp_path / "recipe.yml")
    assert "final norm and head come from" in done.err
    done = run("plan", write_recipe(tmp_path / "r2.yml", text + f"base_model: {pair[1]}\n"), "--json")
    assert done.json()["donor"] == str(pair[1]) and "embeddings come" not in done.err


def test_an_unknown_family_passes_through_and_averages(run, tmp_path):
    """GPT-2 is described nowhere: its layers are found by their names."""
    import transformers

    config = transformers.GPT2Config(n_layer=3, n_embd=16, n_head=2, vocab_size=64, n_positions=32)
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / name)
    ours = merged(
        run,
        tmp_path,
        f"""
merge_method: linear
slices:
  - sources: [{{model: {tmp_path / "a"}, layer_range: [0, 2]}}, {{model: {tmp_path / "b"}, layer_range: [0, 2]}}]
  - merge_method: passthrough
    sources: [{{model: {tmp_path / "b"}, layer_range: [1, 3]}}]
parameters: {{weight: 1}}
""",
    )
    a, b = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert load(tmp_path / "out").config.n_layer == 4
    name = "transformer.h.1.mlp.c_fc.weight"
    close(ours[name], (a[name].double() + b[name].double()) / 2)
    assert ours["transformer.h.3.ln_1.weight"].equal(b["transformer.h.2.ln_1.weight"])


def sinkhorn(cost: np.ndarray, reg: float) -> np.ndarray:
    """Entropic transport with uniform marginals in the log domain, float64, run far beyond convergence."""
    n, m = cost.shape
    f, g = np.zeros(n), np.zeros(m)
    for _ in range(1_000):
        g = -reg * logsumexp((f[:, None] - cost) / reg, axis=0) - reg * np.log(m)
        f = -reg * logsumexp((g[None] - cost) / reg, axis=1) - reg * np.log(n)
    return np.exp((f[:, None] + g[None] - cost) / reg)


@pytest.mark.parametrize("plan_scale", ["coupling", "barycentric"])
def test_paper_formulas(run, tmp_path, plan_scale):
    """Presets of the paper and its script against an independent float64 evaluation of their formulas."""
    base = make_model(tmp_path / "base", layers=2, seed=5)
    preset = {"coupling": "opt_deus_script", "barycentric": "opt_deus_paper"}[plan_scale]
    run("upscale", base, tmp_path / "out", "--preset", preset, "--insert", "all", "-p", "reg=0.2", "-p",
        "tolerance=1e-6", "-p", "zero_init=false")  # fmt: skip
    theirs = {k: v.double().numpy() for k, v in weights(base).items()}
    ours = weights(tmp_path / "out")

    def layer(i: int) -> dict[str, np.ndarray]:
        return {
            k.removeprefix(f"model.layers.{i}."): v for k, v in theirs.items() if k.startswith(f"model.layers.{i}.")
        }

    a, b = layer(0), layer(1)
    made, flow = {}, None
    for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj",
                 "mlp.up_proj", "mlp.down_proj"):  # fmt: skip
        wa, wb = a[name + ".weight"], b[name + ".weight"]
        if name in ("mlp.gate_proj", "mlp.up_proj"):
            wa = wa @ flow
        cost = np.sqrt(np.maximum(((wa[:, None] - wb[None]) ** 2).sum(-1), 0))
        plan = sinkhorn(cost, 0.2)
        if plan_scale == "barycentric":
            plan = plan * len(plan)
        if name == "self_attn.o_proj":
            flow = plan
        made[name + ".weight"] = (plan.T @ wa + wb) / 2
    n1, n2 = "input_layernorm.weight", "post_attention_layernorm.weight"
    made[n1] = (a[n1] + b[n1]) / 2
    made[n2] = (a[n2] @ (flow / 2 + np.eye(len(flow)) / 2) + b[n2]) / 2
    assert len(made) == 9
    for name, oracle in made.items():
        close(ours[f"model.layers.1.{name}"], torch.from_numpy(oracle), 2e-5)


def test_planted_permutation_is_recovered(run, tmp_path):
    """Rows of layer A are those of B in another order: barycentric transport brings every one home."""
    base = make_model(tmp_path / "base", layers=2, seed=3)
    from safetensors.torch import save_file

    tensors = weights(base)
    generator = torch.Generator().manual_seed(0)
    for role in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"):
        b = tensors[f"model.layers.1.{role}.weight"]
        order = torch.randperm(len(b), generator=generator)
        tensors[f"model.layers.0.{role}.weight"] = b[order].clone()
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    run("upscale", base, tmp_path / "out", "--insert", "all", "-p", "alignment=transport_flow", "-p", "reg=0.001", "-p",
        "restore_norm=none", "-p", "zero_init=[down]")  # fmt: skip
    ours = weights(tmp_path / "out")
    for role in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"):
        close(ours[f"model.layers.1.{role}.weight"], ours[f"model.layers.2.{role}.weight"].double())


def test_mixed_recipe_slerp_below_ot_fuse_above(run, pair, tmp_path):
    a, b = pair
    ours = merged(
        run,
        tmp_path,
        f"""
base_model: {a}
slices:
  - merge_method: slerp
    sources: [{{model: {a}, layer_range: [0, 2]}}, {{model: {b}, layer_range: [0, 2]}}]
    parameters: {{t: 0}}
  - merge_method: ot_fuse
    sources: [{{model: {a}, layer_range: [2, 4]}}]
""",
    )
    assert load(tmp_path / "out").config.num_hidden_layers == 5
    assert not ours["model.layers.3.self_attn.o_proj.weight"].any()
    ids = torch.arange(3, 40).unsqueeze(0)
    # slerp at t = 0 is the base but for rounding, and what ot_fuse adds is exactly nothing
    assert (logits(a, ids) - logits(tmp_path / "out", ids)).abs().max() < 1e-3


def test_what_looks_like_a_mistake_is_told(run, pair, tmp_path):
    a, b = pair
    text = f"""
merge_method: linear
slices:
  - sources:
      - {{model: {a}, layer_range: [0, 4], parameters: {{weight: 1}}}}
      - {{model: {b}, layer_range: [0, 4], parameters: {{weight: [{{filter: o_prj, value: 0.5}}, {{value: -1}}]}}}}
"""
    done = run("plan", write_recipe(tmp_path / "r.yml", text))
    assert "filter 'o_prj' is part of no tensor's name" in done.err and "weights sum to 0" in done.err
    expanded = run("plan", tmp_path / "r.yml", "--expand", "--json").json()
    assert expanded["slices"][0]["merge_method"] == "linear"
