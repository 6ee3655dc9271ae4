"""Alignment through the command line: ot_fuse by symmetry, ``align:`` of other methods, limits of memory, bad input."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support import load, logits, make_model, weights, write_recipe
from symmetries import random_symmetry

from deus_merge.methods.registry import methods
from deus_merge.models.head_layout import layer_heads
from deus_merge.models.reference import ModelRef
from deus_merge.models.source import SourceModel

FAMILIES = ("llama", "llama_bias", "mistral", "qwen2", "qwen3")


def planted(base: Path, folder: Path, seed: int = 0) -> Path:
    """A model whose every layer is the base's under a random symmetry: other weights, the same function."""
    source = SourceModel.open(ModelRef(str(base)), {})
    heads = layer_heads(source.checkpoint.config, source.view)
    tensors = weights(base)
    for index, layer in enumerate(source.view.layers):
        attention = random_symmetry(heads, seed + index)
        neurons = torch.randperm(48, generator=torch.Generator().manual_seed(seed + index))
        for role, name in layer.items():
            spec, x = source.view.spec(role), tensors[name]
            if "neurons" in (spec.in_space, spec.out_space):
                x = x[:, neurons] if spec.in_space == "neurons" else x[neurons]
            elif not spec.multiplies and {spec.in_space, spec.out_space} - {None, "residual"}:
                x = attention.move(x.view(len(x), -1).double(), spec.in_space, spec.out_space).view_as(x).to(x.dtype)
            tensors[name] = x.contiguous()
    folder.mkdir()
    (folder / "config.json").write_bytes((base / "config.json").read_bytes())
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def close(x: torch.Tensor, y: torch.Tensor, limit: float = 1e-5) -> bool:
    return (x.double() - y.double()).norm() <= limit * y.double().norm()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_planted_layer_is_fused_with_what_it_was(run, tmp_path, family):
    """Layer 0 is layer 1 under a symmetry, so the layer between them must be layer 1 again."""
    base = make_model(tmp_path / "base", family, layers=2, seed=3)
    moved, tensors = weights(planted(base, tmp_path / "moved")), weights(base)
    for name in [n for n in tensors if ".layers.1." in n]:
        tensors[name.replace(".layers.1.", ".layers.0.")] = moved[name].clone()
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    run("upscale", base, tmp_path / "out", "--insert", "all", "-p", "zero_init=false")
    ours = weights(tmp_path / "out")
    for name in [n for n in tensors if ".layers.1." in n]:
        assert close(ours[name], tensors[name]), name
        assert torch.equal(ours[name.replace(".layers.1.", ".layers.2.")], tensors[name])


LINEAR = "merge_method: linear\nalign: {align}\nmodels:\n  - model: {a}\n  - model: {b}\nparameters: {{weight: 0.5}}\n"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_merged_with_itself_in_disguise_is_itself(run, tmp_path, family):
    base = make_model(tmp_path / "base", family, seed=4)
    other = planted(base, tmp_path / "other")
    ids = torch.randint(0, 128, (1, 20), generator=torch.Generator().manual_seed(0))
    assert (logits(other, ids) - logits(base, ids)).abs().max() < 1e-3
    text = LINEAR.format(align="symmetry", a=other, b=base)
    run("merge", write_recipe(tmp_path / "r.yml", text), tmp_path / "out")
    want, got = weights(base), weights(tmp_path / "out")
    assert all(close(got[name], want[name]) for name in want)
    plain = write_recipe(tmp_path / "p.yml", text.replace("align: symmetry\n", ""))
    run("merge", plain, tmp_path / "plain")
    assert not close(weights(tmp_path / "plain")["model.layers.0.mlp.gate_proj.weight"],
                     want["model.layers.0.mlp.gate_proj.weight"], 0.1)  # fmt: skip
    told = json.loads((tmp_path / "out/deus_merge.json").read_text())
    assert "value_cosine" in json.dumps(told)
    run("merge", tmp_path / "out/deus_merge.yml", tmp_path / "again")  # the recipe it wrote says the same
    assert all(torch.equal(x, weights(tmp_path / "again")[name]) for name, x in got.items())


def test_sources_are_aligned_to_the_base_model(run, tmp_path):
    """Copies of a source that moved are the moved one, in whatever place the base stands."""
    base = make_model(tmp_path / "base", seed=5)
    other = planted(base, tmp_path / "other")
    for index, order in enumerate(((base, other), (other, base))):
        text = f"base_model: {base}\nmerge_method: linear\nalign: {{alignment: symmetry}}\nmodels:\n" + "".join(
            f"  - {{model: {m}, parameters: {{weight: {int(m == other)}}}}}\n" for m in order
        )
        out = tmp_path / f"out{index}"
        run("merge", write_recipe(tmp_path / "r.yml", text), out)
        assert all(close(weights(out)[name], x) for name, x in weights(base).items())
    assert not torch.equal(weights(out)["model.layers.1.mlp.up_proj.weight"],
                           weights(other)["model.layers.1.mlp.up_proj.weight"])  # fmt: skip


@pytest.mark.parametrize("method", sorted(name for name, m in methods().items() if not m.inserts))
@pytest.mark.parametrize("align", ["symmetry", "transport_flow"])
def test_every_method_takes_aligned_sources(run, tmp_path, method, align):
    """The result of aligned sources is that of sources which were aligned beforehand."""
    base = make_model(tmp_path / "base", seed=6, layers=2)
    if method == "passthrough":
        return
    others = [tmp_path / "one", tmp_path / "two"][: 2 if method in ("model_stock", "nuslerp") else 1]
    for seed, other in enumerate(others, 7):
        planted(base, other) if align == "symmetry" else make_model(other, seed=seed, layers=2)
    parameters = {"slerp": "t: 0.4", "nuslerp": "weight: 0.5", "nearswap": "t: 0.01"}.get(method, "weight: 1.0")
    head = f"base_model: {base}\nmerge_method: {method}\nparameters: {{{parameters}}}\n"
    if "weight" in parameters and not any(p.name == "weight" for p in methods()[method].parameters):
        head = head.replace(f"parameters: {{{parameters}}}\n", "")
    text = (
        head
        + f"slices:\n  - align: {align}\n    sources:\n"
        + "".join(f"      - {{model: {m}, layer_range: [0, 2]}}\n" for m in (base, *others))
    )
    run("merge", write_recipe(tmp_path / "r.yml", text), tmp_path / "out")
    load(tmp_path / "out")
    if align == "symmetry":  # both sources are the base by then
        plain = text.replace("    align: symmetry\n", "").replace("  - align: symmetry\n    sources", "  - sources")
        for other in others:
            shutil.copy(base / "model.safetensors", other)
        run("merge", write_recipe(tmp_path / "p.yml", plain), tmp_path / "plain")
        want, got = weights(tmp_path / "plain"), weights(tmp_path / "out")
        if not getattr(methods()[method], "random", False):
            assert all(close(got[n], want[n], 1e-4) for n in want if ".layers." in n)


@pytest.mark.parametrize("fraction", [0.01, 0.25, 0.3, 1.0])
def test_partial_fuses_the_best_share_and_keeps_the_rest(run, tmp_path, fraction):
    base = make_model(tmp_path / "base", layers=2, num_key_value_heads=4)
    options = ["-p", "match=partial", "-p", f"match_fraction={fraction}", "-p", "zero_init=false"]
    run("upscale", base, tmp_path / "out", "--insert", "all", *options)
    ours, at = weights(tmp_path / "out"), "model.layers.{}."
    kept = {}
    for role, axis in (("mlp.gate_proj", 0), ("mlp.up_proj", 0), ("mlp.down_proj", 1), ("self_attn.v_proj", 0)):
        new, upper = (ours[at.format(i) + role + ".weight"] for i in (1, 2))
        kept[role] = (new == upper).all(1 - axis)
    neurons, groups = math.ceil(fraction * 48 - 1e-9), math.ceil(fraction * 4 - 1e-9)
    assert (~kept["mlp.gate_proj"]).sum() == neurons
    assert torch.equal(kept["mlp.gate_proj"], kept["mlp.up_proj"])
    assert torch.equal(kept["mlp.gate_proj"], kept["mlp.down_proj"])
    assert (~kept["self_attn.v_proj"].view(4, -1).all(1)).sum() == groups
    told = json.loads((tmp_path / "out/deus_merge.json").read_text())
    assert f'"fused": {neurons}' in json.dumps(told)


def test_soft_plans_of_neurons_tend_to_the_hard_one(run, tmp_path):
    base = make_model(tmp_path / "base", layers=2)
    far = []
    run("upscale", base, tmp_path / "hard", "--insert", "all")
    hard = weights(tmp_path / "hard")["model.layers.1.mlp.gate_proj.weight"]
    for reg in (0.3, 0.01, 1e-5):
        run("upscale", base, tmp_path / "soft", "--insert", "all", "-p", "solver=sinkhorn", "-p", f"reg={reg}",
            "--overwrite")  # fmt: skip
        far.append((weights(tmp_path / "soft")["model.layers.1.mlp.gate_proj.weight"] - hard).norm().item())
    assert far[0] > far[1] > far[2] and far[2] < 1e-3 * hard.norm()


@pytest.mark.parametrize("preset", ["opt_deus", "opt_deus_paper"])
def test_a_memory_limit_does_not_show_in_the_bytes(run, tmp_path, monkeypatch, preset):
    monkeypatch.setattr("deus_merge.ot.blocks.PRODUCT_ELEMENTS", 300)  # several row blocks
    base = make_model(tmp_path / "base", layers=2)
    recipe = write_recipe(tmp_path / "r.yml", f"base_model: {base}\nupscale: {{preset: {preset}, insert: all}}\n")
    plan = run("plan", recipe, "--json").json()
    assert plan["minimum_memory_bytes"] < plan["peak_memory_bytes"]
    outputs = []
    for limit in (None, plan["minimum_memory_bytes"]):
        more = ["--max-memory", str(limit)] if limit else []
        run("merge", recipe, tmp_path / "out", "--overwrite", *more)
        outputs.append((tmp_path / "out/model.safetensors").read_bytes())
    assert outputs[0] == outputs[1]
    said = run("merge", recipe, tmp_path / "small", "--max-memory", str(plan["minimum_memory_bytes"] - 1), expect=2).err
    assert "needs more memory than allowed" in said


# wrong input ----------------------------------------------------------------------------------------------------------

SLICES = "merge_method: linear\nparameters: {weight: 1}\n"


def two(extra: str, method: str = "linear") -> str:
    return (
        f"merge_method: {method}\nslices:\n  - {extra}\n    sources:\n"
        "      - {model: base, layer_range: [0, 2]}\n      - {model: base, layer_range: [1, 3]}\n"
    )


def fuse(parameters: str, model: str = "base") -> str:
    return f"base_model: {model}\nupscale: {{insert: all, parameters: {{{parameters}}}}}\n"


BAD = {
    "unknown alignment": (two("align: symetry"), "slices[0].align (line 3)", "did you mean 'symmetry'?"),
    "unknown key": (two("align: {alignmnt: symmetry}"), "did you mean 'alignment'?"),
    "unknown step": (two("align: {symmetry: [neuron]}"), "slices[0].align.symmetry", "experts, neurons, heads"),
    "no list": (fuse("symmetry: neurons"), "a list of experts, neurons, heads, values, rotary"),
    "gradient": (two("align: {reg: [0.1, 0.2, x]}"), "slices[0].align.reg"),
    "ot_fuse aligns": (two("align: symmetry", "ot_fuse"), "ot_fuse has its own alignment", "parameters: {alignment"),
    "one source": (
        "merge_method: passthrough\nslices:\n  - align: symmetry\n    sources:\n      - {model: base}\n",
        "align needs at least two sources",
    ),
    "upscale": ("base_model: base\nalign: symmetry\nupscale: {}\n", "align (line 2)", "parameters: {alignment"),
    "fraction of nothing": (fuse("match: partial, match_fraction: 0"), "above 0 and at most 1"),
    "score": (fuse("match: partial, match_score: 2"), "a cosine from -1 to 1"),
    "match": (fuse("match: best"), "full | partial"),
    "coupling": (fuse("plan_scale: coupling"), "belongs to alignment: transport_flow"),
    "solver": (fuse("solver: simplex"), "sinkhorn"),
    "undescribed": (
        "merge_method: linear\nalign: symmetry\nmodels: [{model: strange}, {model: strange2}]\n"
        "parameters: {weight: 1}\n", "align (line 2)",
        "no description of the tensors",
    ),
    "heads that do not divide": (fuse("", "undivided"), "3 query heads do not divide among 2 key-value heads"),
}  # fmt: skip
LATE = {
    "not finite": (fuse("", "nan"), "layer 1", "up (model.layers.0.mlp.up_proj.weight", "NaN or infinity"),
    "not finite, flow": (
        fuse("alignment: transport_flow", "nan"), "layer 1", "up (model.layers.0.mlp.up_proj.weight", "not finite",
    ),
    "overflow": (
        fuse("unit_rows: false, alignment: transport_flow", "huge"), "layer 1", "gate (model.layers.0.mlp.gate_proj",
        "overflows float32", "compute_dtype: float64",
    ),
    "empty match": (
        fuse("match: partial, match_score: 0.9999"), "layer 1", "q (model.layers.0.self_attn.q_proj.weight",
        "match_score", "the best of 2 has",
    ),
    "empty match of neurons": (
        fuse("match: partial, match_score: 0.9999, symmetry: [neurons]"), "gate (model.layers.0.mlp.gate_proj.weight",
        "no neuron matches well enough", "the best of 48 has",
    ),
    "empty match of rows": (
        fuse("match: partial, match_score: 0.9999, alignment: transport_flow"), "q (model.layers.0.self_attn.q_proj",
        "no row matches well enough",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("models")
    base = make_model(root / "base")
    tensors, config = weights(base), json.loads((base / "config.json").read_text())

    def other(name: str, new_tensors: dict | None = None, **new_config) -> None:
        (root / name).mkdir()
        (root / name / "config.json").write_text(json.dumps(config | new_config))
        save_file(new_tensors or tensors, root / name / "model.safetensors", {"format": "pt"})

    up, gate = "model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.gate_proj.weight"
    broken = tensors[up].clone()
    broken[3, 4] = math.nan
    other("nan", tensors | {up: broken})
    other("huge", tensors | {gate: tensors[gate] * 1e25})
    other("strange", model_type="strange")
    other("strange2", model_type="strange")
    fewer = {
        n: x[:24].clone() if "q_proj" in n else x[:, :24].clone() if "o_proj" in n else x for n, x in tensors.items()
    }
    other("undivided", fewer, num_attention_heads=3, head_dim=8)
    return root


@pytest.mark.parametrize("name", [*BAD, *LATE])
def test_wrong_input_is_told_with_its_place(run, tmp_path, models, monkeypatch, name):
    monkeypatch.chdir(models)
    text, *fragments = (BAD | LATE)[name]
    said = run("merge", write_recipe(tmp_path / "r.yml", text), tmp_path / "out", expect=2).err
    for fragment in fragments:
        assert fragment in said, said
    assert "Traceback" not in said and not (tmp_path / "out").exists()
    if name in BAD:
        assert list(tmp_path.iterdir()) == [tmp_path / "r.yml"]
