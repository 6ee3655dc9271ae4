"""Other trainers' settings."""

from __future__ import annotations

import pytest
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
    done = run("export-training", deeper, "--for", "axolotl")
    settings = yaml.safe_load(done.out)
    assert settings["unfrozen_parameters"] == ["^model.layers.2.", "^model.layers.4."]
    assert settings["base_model"] == str(deeper)
    assert settings["gradient_checkpointing_kwargs"] == {"use_reentrant": False}


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
        assert "LLaMA-Factory cannot train only" in reported and expected in reported
        every = yaml.safe_load(expected)
        again = grow(tmp_path / "base", tmp_path / "again", "llama_pro", every)
        settings = yaml.safe_load(run("export-training", again, "--for", "llama-factory").out)
        assert settings["use_llama_pro"] is True and settings["freeze_trainable_layers"] == 12 // every["every"]
        return
    settings = yaml.safe_load(run("export-training", out, "--for", "llama-factory").out)
    common = {"model_name_or_path": str(out), "finetuning_type": "freeze", "freeze_trainable_modules": "all"}
    assert settings == common | expected


def test_settings_that_there_are_none_for(run, deeper, tmp_path):
    reported = run("export-training", deeper, "--for", "torchtune", expect=2).err
    assert "torchtune cannot train only" in reported and "new layers 2, 4" in reported
    assert "llama-factory" in run("export-training", deeper, "--for", "unsloth", expect=2).err
    config = transformers.OpenAIGPTConfig(n_embd=8, n_head=2, n_layer=2, vocab_size=32)
    transformers.OpenAIGPTLMHeadModel(config).save_pretrained(tmp_path / "gpt")
    out = grow(tmp_path / "gpt", tmp_path / "out", "stack", None)
    reported = run("export-training", out, "--for", "axolotl", expect=2).err
    assert "model_type 'openai-gpt'" in reported and "--for trainer" in reported
    model = load(out)
    assert training.freeze_base(model, out).layers == (2, 3)
