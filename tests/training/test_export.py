"""Other trainers' settings."""

from __future__ import annotations

import os

import pytest
import tiny_models
import transformers
import yaml
from grown import grow
from support import load, make_model

from deus_merge import training


def test_settings_for_the_trainer_run(run, deeper, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scope: dict = {}
    exec(run("export-training", deeper).out, scope)
    trained = {name for name, p in scope["model"].named_parameters() if p.requires_grad}
    assert trained == set(training.new_parameters(deeper))
    assert type(scope["trainer"].callback_handler.callbacks[0]).__name__ == "NewLayersCallback"


def test_settings_for_axolotl(run, deeper):
    """Its patterns match the beginning of names, and their dots are literal."""
    done = run("export-training", deeper, "--for", "axolotl", "--private-paths")
    settings = yaml.safe_load(done.out)
    assert settings["unfrozen_parameters"] == ["^model.layers.2.", "^model.layers.4."]
    assert settings["base_model"] == str(deeper)
    assert settings["gradient_checkpointing_kwargs"] == {"use_reentrant": False}


def test_paths_are_seen_from_here(run, deeper, tmp_path, monkeypatch):
    """Settings are shared, so they have no absolute path, and they work in the folder where they were printed."""
    for place in (deeper.parent, deeper, tmp_path):
        monkeypatch.chdir(place)
        text = run("export-training", deeper, "--for", "axolotl").out
        path = yaml.safe_load(text)["base_model"]
        assert not os.path.isabs(path) and os.path.samefile(path, deeper) and str(tmp_path.parent) not in text
        assert "--private-paths" in text


# fmt: off
FACTORY = {  # preset, where, and the setting of LLaMA-Factory: every k-th layer, the last, the first; or nothing
    "evenly": ("llama_pro", {"every": 3}, {"freeze_trainable_layers": 4, "use_llama_pro": True}),
    "each": ("llama_pro", {"every": 1}, {"freeze_trainable_layers": 12, "use_llama_pro": True}),
    "at the end": ("llama_pro", {"after": [11]}, {"freeze_trainable_layers": 1}),
    "a second copy": ("stack", None, {"freeze_trainable_layers": 12}),
    "evenly, but not to the end": ("llama_pro", {"every": 5}, "{every: 6}"),
    "in the upper half": ("opt_deus", "top_half", "{every: 2}"),
    "evenly, but at other places": ("copy_next", {"after": [1, 4, 7, 10]}, "{every: 3}"),
}
# fmt: on


@pytest.mark.parametrize("case", FACTORY)
def test_settings_for_llama_factory(run, tmp_path, case):
    preset, insert, expected = FACTORY[case]
    out = grow(make_model(tmp_path / "base", layers=12), tmp_path / "out", preset, insert)
    if isinstance(expected, str):
        reported = run("export-training", out, "--for", "llama-factory", expect=2).err
        assert "LLaMA-Factory cannot train only" in reported
        assert f"--preset llama_pro --insert '{expected}'" in " ".join(reported.split())  # what works, as a command
        assert yaml.safe_load(run("export-training", out, "--for", "axolotl").out)[
            "unfrozen_parameters"
        ]  # so does this
        every = yaml.safe_load(expected)
        again = grow(tmp_path / "base", tmp_path / "again", "llama_pro", every)
        settings = yaml.safe_load(run("export-training", again, "--for", "llama-factory").out)
        assert settings["use_llama_pro"] is True and settings["freeze_trainable_layers"] == 12 // every["every"]
        return
    settings = yaml.safe_load(run("export-training", out, "--for", "llama-factory", "--private-paths").out)
    common = {"model_name_or_path": str(out), "finetuning_type": "freeze", "freeze_trainable_modules": "all"}
    assert settings == common | expected


def rates_of(optimizer, model) -> dict[str, float]:
    names = {id(p): name for name, p in model.named_parameters()}
    return {names[id(p)]: group["lr"] for group in optimizer.param_groups for p in group["params"]}


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_an_optimizer_for_the_trainer(run, deeper, tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    scope: dict = {}
    options = ("--optimizer", kind, "--lr", "3e-4", "--output-ratio", 3)
    exec(run("export-training", deeper, *options).out, scope)
    expected = training.optimizer(scope["model"], deeper, kind=kind, lr=3e-4, output_ratio=3.0)
    assert scope["trainer"].optimizer is scope["optimizer"] and type(scope["optimizer"]) is type(expected)
    assert rates_of(scope["optimizer"], scope["model"]) == rates_of(expected, scope["model"])


def test_rates_for_axolotl(run, tmp_path):
    """By its rule every weight has the rate that it has here; a bias that it cannot give one is named."""
    for family in ("llama", "llama_bias"):
        out = grow(
            make_model(tmp_path / family, family, layers=12), tmp_path / f"{family}-out", insert={"after": [0, 9]}
        )
        text = run("export-training", out, "--for", "axolotl", "--lr", "3e-4", "--output-ratio", 3).out
        settings = yaml.safe_load(text)
        (group,) = settings["lr_groups"]
        model = load(out)
        training.freeze_base(model, out)
        decayed = {n for n in training.new_parameters(out) if n.endswith("proj.weight")}  # norms and biases never match
        by_rule = {
            name: group["lr"]
            if name in decayed and any(m in name for m in group["modules"])
            else settings["learning_rate"]
            for name in training.new_parameters(out)
        }
        rates = rates_of(training.optimizer(model, out, lr=3e-4, output_ratio=3.0), model)
        unlike = {name for name in rates if by_rule[name] != pytest.approx(rates[name])}
        assert unlike == {n for n in rates if n.endswith(("o_proj.bias", "down_proj.bias"))}
        assert bool(unlike) is (family == "llama_bias") is ("lr_groups leaves out biases" in text)
        assert group["lr"] == 9e-4 and settings["optimizer"] == "adamw_torch_fused"


# fmt: off
MUON = {  # trainer and family, and what its comments or its error say
    ("axolotl", "llama"): "does not train norms and biases",
    ("axolotl", "phi3"): "even if it consists of several: model.layers.6.",
    ("axolotl", "qwen3_moe"): None,
    ("llama-factory", "llama"): "weight_decay",
    ("llama-factory", "phi3"): "even if it consists of several: model.layers.6.",
    ("llama-factory", "qwen3_moe"): "AdamW trains them",
}
# fmt: on


@pytest.mark.parametrize(("trainer", "family"), MUON)
def test_muon_of_other_trainers(run, tmp_path, trainer, family):
    out = grow(tiny_models.make(tmp_path / "base", family), tmp_path / "out", "llama_pro", {"after": [5]})
    options = ("export-training", out, "--for", trainer, "--optimizer", "muon", "--lr", "2e-3")
    if MUON[trainer, family] is None:
        assert "axolotl cannot express this optimizer" in run(*options, expect=2).err
        return
    text = run(*options).out
    settings = yaml.safe_load(text)
    assert settings["learning_rate"] == 2e-3
    assert settings["optimizer"] == "muon" if trainer == "axolotl" else settings["use_muon"] is True
    assert MUON[trainer, family] in text and ("even if" in text) is (family == "phi3")
    reported = run(*options, "--output-ratio", 2, expect=2).err
    assert "cannot express this optimizer" in reported and "output_ratio 2" in reported


def test_optimizers_that_are_not_exported(run, deeper):
    assert "needs a learning rate" in run("export-training", deeper, "--optimizer", "muon", expect=2).err
    assert "not a rate" in run("export-training", deeper, "--lr", "-1", expect=2).err
    assert "optimizer" not in run("export-training", deeper, "--for", "axolotl").out


def test_settings_that_there_are_none_for(run, deeper, tmp_path):
    assert "llama-factory" in run("export-training", deeper, "--for", "unsloth", expect=2).err
    config = transformers.OpenAIGPTConfig(n_embd=8, n_head=2, n_layer=2, vocab_size=32)
    transformers.OpenAIGPTLMHeadModel(config).save_pretrained(tmp_path / "gpt")
    out = grow(tmp_path / "gpt", tmp_path / "out", "stack", None)
    reported = run("export-training", out, "--for", "axolotl", expect=2).err
    assert "model_type 'openai-gpt'" in reported and "--for trainer" in reported
    model = load(out)
    assert training.freeze_base(model, out).layers == (2, 3)
