"""Models, and what mergekit makes of them: one process for all recipes, in an environment of its own."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from cases import DRAWN, EQUAL, FAMILIES, REFUSED, SEEDS, STORED, TOKENIZERS, drawn
from safetensors.torch import save_file
from support import make_model, make_speakers, weights

ROOT = Path(__file__).parent.parent.parent
PYTHON = Path(os.environ.get("DEUS_MERGE_ORACLE", ROOT / ".venv-oracle/bin/python"))


@dataclass(frozen=True)
class Answer:
    """What mergekit made of a recipe.

    Attributes:
        recipe: The file, which we run too.
        out: The checkpoint, if there is one.
        error: Else what it said.
    """

    recipe: Path
    out: Path
    error: str | None


def pytest_collection_modifyitems(items):
    """One process asks mergekit once; and it takes minutes."""
    for item in items:
        if "parity" in item.path.parts:
            item.add_marker(pytest.mark.xdist_group("parity"))
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory) -> dict[str, dict[str, Path]]:
    """family -> name -> folder: a base model, three fine-tunes, and a model that is far away."""
    root = tmp_path_factory.mktemp("parity")
    return {family: _family(root / family, family) for family in FAMILIES}


@pytest.fixture(scope="session")
def speakers(tmp_path_factory) -> dict[str, dict[str, Path]]:
    """family -> name -> folder: the models of `TOKENIZERS`."""
    root = tmp_path_factory.mktemp("speakers")
    return {
        family: make_speakers(root / family, family, dtype=getattr(torch, dtype), tied=tied)
        for family, (dtype, tied, _) in FAMILIES.items()
    }


@pytest.fixture(scope="session")
def answers(checkpoints, speakers, tmp_path_factory) -> dict[tuple, Answer]:
    """(family, case) or (case, seed) -> mergekit's answer."""
    root = tmp_path_factory.mktemp("oracle")
    jobs = {}
    for family, models in checkpoints.items():
        for name, text in EQUAL.items():
            jobs[family, name] = (text.format(**models) + FAMILIES[family][2], 0)
        for name, text in TOKENIZERS.items():
            jobs[family, "tokenizer", name] = (text.format(**speakers[family]) + FAMILIES[family][2], 0)
    llama = checkpoints["llama"]
    for name in STORED:
        jobs["stored dtype", name] = (EQUAL[name].format(**checkpoints["qwen2"]) + "dtype: bfloat16\n", 0)
    for name, (text, _) in REFUSED.items():
        jobs["refused", name] = (text.format(**llama), 0)
    for name, case in DRAWN.items():
        for seed in SEEDS:
            jobs[name, seed] = (drawn(case).format(**llama), seed)
    return _ask(root, jobs)


def _ask(root: Path, jobs: dict[tuple, tuple[str, int]]) -> dict[tuple, Answer]:
    if not PYTHON.exists():
        reason = f"no mergekit to compare with at {PYTHON}: run `make oracle`"
        pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)
    plan, found = [], {}
    for number, (key, (text, seed)) in enumerate(jobs.items()):
        recipe, out = root / f"{number}.yml", root / str(number)
        recipe.write_text(text)
        plan.append({"recipe": str(recipe), "out": str(out), "seed": seed})
        found[key] = Answer(recipe, out, None)
    (root / "jobs.json").write_text(json.dumps(plan))
    command = [PYTHON, Path(__file__).parent / "oracle.py", root / "jobs.json"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    for key, answer in found.items():
        error = Path(f"{answer.out}.error")
        if error.exists():
            found[key] = Answer(answer.recipe, answer.out, error.read_text())
    return found


def _family(root: Path, family: str) -> dict[str, Path]:
    dtype, tied, _ = FAMILIES[family]
    seeds = {"base": 1, "far": 2}
    models = {
        name: make_model(root / name, family, dtype=getattr(torch, dtype), tied=tied, seed=seed)
        for name, seed in seeds.items()
    }
    for seed, name in enumerate("abc"):
        models[name] = _fine_tune(models["base"], root / name, seed)
    return models


def _fine_tune(base: Path, folder: Path, seed: int) -> Path:
    """Changes of many sizes to about 7 in 10 elements; one tensor, another in each, stays as it is."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_bytes((base / "config.json").read_bytes())
    generator = torch.Generator().manual_seed(100 + seed)
    changed = {}
    for number, (name, tensor) in enumerate(sorted(weights(base).items())):
        sizes = torch.randn(tensor.shape, generator=generator).exp() * 0.02
        delta = torch.randn(tensor.shape, generator=generator) * sizes
        delta *= torch.rand(tensor.shape, generator=generator) < 0.7
        changed[name] = tensor if number == 3 + seed else (tensor.float() + delta).to(tensor.dtype)
    save_file(changed, folder / "model.safetensors", {"format": "pt"})
    return folder
