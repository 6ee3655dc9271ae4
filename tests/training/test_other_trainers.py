"""What axolotl and LLaMA-Factory, with the versions that they pin, make of the settings exported for them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from grown import grow
from support import load, make_model

from deus_merge import training
from deus_merge.training.export import VERSIONS

ROOT = Path(__file__).parents[2]
PYTHONS = {
    name: Path(os.environ.get(variable, ROOT / folder / "bin/python"))
    for name, variable, folder in (
        ("axolotl", "DEUS_MERGE_AXOLOTL", ".venv-axolotl"),
        ("llama-factory", "DEUS_MERGE_LLAMA_FACTORY", ".venv-llamafactory"),
    )
}
# fmt: off
#: what is exported, and the optimizer that the trainer makes of it
OPTIMIZERS = {
    "none": ((), {"axolotl": "adamw_torch_fused", "llama-factory": "adamw_torch_fused"}),
    "adamw": (("--lr", "3e-4"), {"axolotl": "adamw_torch_fused", "llama-factory": "adamw_torch"}),
    "ratio": (("--lr", "3e-4", "--output-ratio", 3), {"axolotl": "adamw_torch_fused"}),
    "muon": (("--lr", "2e-3", "--optimizer", "muon"), {"axolotl": "muon", "llama-factory": "Muon"}),
}
#: where new layers are: LLaMA-Factory takes those that are evenly spaced
PLACES = {"evenly": {"every": 3}, "anywhere": {"after": [0, 4]}}
# fmt: on


def ask(trainer: str, folder: Path, texts: dict[tuple, str]) -> dict[tuple, dict]:
    """The answers to exported settings: one process for all."""
    if trainer == "llama-factory" and sys.version_info < (3, 11):
        pytest.skip("LLaMA-Factory needs Python 3.11")
    if not PYTHONS[trainer].exists():
        reason = f"no {trainer} at {PYTHONS[trainer]}: run `make trainers`"
        pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)
    jobs = []
    for number, text in enumerate(texts.values()):
        (folder / f"{number}.yml").write_text(text)
        jobs.append({"settings": str(folder / f"{number}.yml"), "out": str(folder / f"{number}.json")})
    (folder / "jobs.json").write_text(json.dumps(jobs))
    command = [PYTHONS[trainer], Path(__file__).with_name("settings_reader.py"), trainer, folder / "jobs.json"]
    offline = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "AXOLOTL_DO_NOT_TRACK": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env={**os.environ, **offline})
    assert done.returncode == 0, done.stderr[-3000:]
    return {key: json.loads(Path(job["out"]).read_text()) for key, job in zip(texts, jobs, strict=True)}


@pytest.mark.slow
@pytest.mark.parametrize("trainer", PYTHONS)
def test_the_trainer_reads_its_settings(run, tmp_path, trainer):
    """Its parser takes every key, its own code trains the new layers and nothing else, at the rates that were asked."""
    texts, outs = {}, {}
    for place, insert in PLACES.items():
        if (trainer, place) == ("llama-factory", "anywhere"):
            continue
        outs[place] = grow(
            make_model(tmp_path / place / "base", layers=12), tmp_path / place / "out", "llama_pro", insert
        )
        for name, (options, made) in OPTIMIZERS.items():
            if trainer in made:
                texts[place, name] = run(
                    "export-training", outs[place], "--for", trainer, "--private-paths", *options
                ).out
    typo = next(iter(texts.values())).replace("unfrozen_parameters", "unfrozen_parameter")
    texts["", "typo"] = typo.replace("freeze_trainable_layers", "freeze_trainable_layer")
    answers = ask(trainer, tmp_path, texts)
    refused = answers.pop(("", "typo"))
    assert ("unfrozen_parameter" if trainer == "axolotl" else "freeze_trainable_layer") in refused["error"]
    for (place, name), found in answers.items():
        assert "error" not in found, found["error"]
        model = load(outs[place])
        training.freeze_base(model, outs[place])
        options = dict(zip(OPTIMIZERS[name][0][::2], OPTIMIZERS[name][0][1::2], strict=True))
        assert found["trained"] == sorted(training.new_parameters(outs[place])), (place, name)
        assert found["optimizer"] == OPTIMIZERS[name][1][trainer]
        assert found["transformers"] in VERSIONS[trainer] and found.get("reentrant", False) is False
        if options:
            ratio = float(options.get("--output-ratio", 1))
            ours = training.optimizer(model, outs[place], lr=float(options["--lr"]), output_ratio=ratio)
            names = {id(p): n for n, p in model.named_parameters()}
            rates = {names[id(p)]: group["lr"] for group in ours.param_groups for p in group["params"]}
            assert found["rates"] == pytest.approx(rates), (place, name)
        if found["optimizer"] == "Muon":
            assert found["by_muon"] == [n for n in found["trained"] if not n.endswith("norm.weight")]
