"""CONTRIBUTING.md: its tree is that of the files, and each of its examples works as one new file."""

from __future__ import annotations

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import save_file
from support import load, make_model, weights, write_recipe

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
EXAMPLES = dict(re.findall(r"<!-- example: (\S+) -->\n```python\n(.*?)```", PAGE, re.DOTALL))


@pytest.fixture
def run_with(tmp_path):
    """Run the command line of a copy of the package that has one more file."""

    def call(example: str, *arguments, code: int = 0) -> str:
        package = tmp_path / "copy/deus_merge"
        if not package.exists():
            shutil.copytree(ROOT / "deus_merge", package, ignore=shutil.ignore_patterns("__pycache__"))
        (package / example).write_text(EXAMPLES[example], encoding="utf-8")
        command = [sys.executable, "-m", "deus_merge", *map(str, arguments)]
        environment = {**os.environ, "PYTHONPATH": str(package.parent)}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
        assert done.returncode == code, done.stderr
        return done.stdout + done.stderr

    return call


def test_tree_is_up_to_date():
    script = runpy.run_path(str(ROOT / "docs/make_tree.py"))
    assert script["with_tree"](PAGE) == PAGE, "run: python docs/make_tree.py"
    package = ROOT / "deus_merge"
    folders = {path.name for path in package.iterdir() if path.is_dir() and not path.name.startswith("_")}
    assert folders == set(script["FOLDERS"])
    assert len([p for p in package.iterdir() if not p.name.startswith("_") and p.name != "py.typed"]) <= 14


def test_the_drawing_names_files_that_exist():
    drawing = PAGE.split("## One tensor's way")[1].split("```")[1]
    named = re.findall(r"\b((?:\w+/)+\w+\.py)\b", drawing)
    assert len(named) > 10
    assert [name for name in named if not (ROOT / "deus_merge" / name).exists()] == []


@pytest.mark.slow
def test_a_method_is_one_file(run_with, tmp_path):
    models = [make_model(tmp_path / name, layers=2, seed=seed) for seed, name in enumerate("abc")]
    sources = "".join(f"  - model: {model}\n" for model in models)
    recipe = write_recipe(tmp_path / "r.yml", f"merge_method: median\nparameters: {{scale: 2}}\nmodels:\n{sources}")
    run_with("methods/median.py", "merge", recipe, tmp_path / "out", "--quiet")
    merged = weights(tmp_path / "out")
    for name, tensor in merged.items():
        stacked = torch.stack([weights(model)[name].double() for model in models])
        assert torch.allclose(tensor.double(), 2 * stacked.median(dim=0).values, rtol=1e-6), name
    assert "elementwise median" in run_with("methods/median.py", "methods", "median")
    two = write_recipe(tmp_path / "two.yml", "merge_method: median\nmodels:\n" + "".join(sources.splitlines(True)[:2]))
    assert "odd number of sources" in run_with("methods/median.py", "merge", two, tmp_path / "no", code=2)


@pytest.mark.slow
def test_a_format_is_one_file(run_with, tmp_path):
    base = make_model(tmp_path / "base", layers=3)
    tensors, values = weights(base), {}
    for name in [name for name in tensors if "proj" in name]:
        scale = tensors[name].abs().amax(dim=1) / 127  # (out,)
        tensors[name] = (tensors[name] / scale[:, None]).round().to(torch.int8)
        tensors[f"{name}_row_scale"], values[name] = scale, tensors[name].float() * scale[:, None]
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "int8_rows", "skipped_modules": ["lm_head"]}
    (base / "config.json").write_text(json.dumps(config))
    example = "checkpoint/formats/int8_rows.py"
    run_with(example, "upscale", base, tmp_path / "deeper", "--preset", "llama_pro", "--insert", "{after: [1]}")
    new = weights(tmp_path / "deeper")["model.layers.2.mlp.up_proj.weight"]
    assert torch.equal(new, values["model.layers.1.mlp.up_proj.weight"])
    section = json.loads((tmp_path / "deeper/config.json").read_text())["quantization_config"]
    assert section["skipped_modules"][:2] == ["lm_head", "model.layers.2.self_attn.q_proj"]
    run_with(example, "verify", tmp_path / "deeper")
    assert "skipped_modules" in run_with(example, "methods", "int8_rows")


@pytest.mark.slow
def test_a_family_is_one_file(run_with, tmp_path):
    config = transformers.Jais2Config(
        vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    base = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    base.save_pretrained(tmp_path / "base")
    run_with("models/families/jais2.py", "upscale", tmp_path / "base", tmp_path / "deeper", "--insert", "all")
    deeper, ids = load(tmp_path / "deeper"), torch.arange(20).view(1, -1)
    assert deeper.config.num_hidden_layers == 7
    with torch.no_grad():
        assert torch.equal(deeper(ids).logits, base.eval()(ids).logits)
    new = weights(tmp_path / "deeper")["model.layers.1.mlp.up_proj.weight"]
    stored = weights(tmp_path / "base")
    assert not any(new.equal(stored[f"model.layers.{i}.mlp.up_proj.weight"]) for i in (0, 1))  # fused, not copied


@pytest.mark.slow
def test_a_solver_with_an_option_is_one_file(run_with, tmp_path):
    base = make_model(tmp_path / "base", layers=2)
    parameters = "{alignment: transport_flow, solver: nearest, neighbours: 2, unit_rows: false, cost_scale: none, t: 0"
    recipe = write_recipe(
        tmp_path / "r.yml",
        f"base_model: {base}\nupscale: {{insert: all, parameters: {parameters}, restore_norm: none}}}}\n",
    )
    run_with("ot/solvers/nearest.py", "merge", recipe, tmp_path / "out", "--quiet")
    stored, name = weights(base), "model.layers.{}.self_attn.q_proj.weight"
    a, b = (stored[name.format(i)].double() for i in (0, 1))  # (n, d) each
    nearest = torch.cdist(a, b).topk(2, dim=0, largest=False).indices  # (2, n)
    assert torch.allclose(weights(tmp_path / "out")[name.format(1)].double(), a[nearest].mean(dim=0), atol=1e-6)
    assert "neighbours" in run_with("ot/solvers/nearest.py", "methods", "nearest")
    wrong = write_recipe(tmp_path / "wrong.yml", recipe.read_text().replace("neighbours: 2", "neighbours: 0"))
    assert "neighbours" in run_with("ot/solvers/nearest.py", "merge", wrong, tmp_path / "no", code=2)
