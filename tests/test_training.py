"""The way into training: what trains is what is new, whatever the model is wrapped in; and the ways back and on."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from safetensors.torch import save_file
from support import load, make_model, weights

from deus_merge import api, training
from deus_merge.errors import CheckpointError, TrainingError

RECIPES = Path(__file__).parent.parent / "recipes" / "training"
IDS = torch.arange(3, 35).unsqueeze(0)  # (1, 32)


def grow(base: Path, out: Path, preset: str = "opt_deus", insert: object = "top_half") -> Path:
    api.merge(api.upscale_recipe(base, preset=preset, insert=insert), out, api.RunOptions(verify=False))
    return out


@pytest.fixture(scope="module")
def deeper(tmp_path_factory) -> Path:
    """4 layers and new ones at 2 and 4; tied embeddings."""
    folder = tmp_path_factory.mktemp("training")
    return grow(make_model(folder / "base", tied=True), folder / "deeper")


def changed(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    """Names of tensors whose bits differ."""
    return {n for n in before if not torch.equal(before[n].view(torch.uint8), after[n].detach().view(torch.uint8))}


# freezing ------------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def no_group_left():
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _frozen(model, tmp_path, deeper):
    training.freeze_base(model, deeper)
    return model


def _distributed(model, tmp_path, deeper):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    return torch.nn.parallel.DistributedDataParallel(model)


def _lora(model, *_):
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "down_proj"]))


def _token_lora(model, *_):
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], trainable_token_indices=[1, 2]))


def _own_lora(model, *_):
    peft = pytest.importorskip("peft")
    model.add_adapter(peft.LoraConfig(target_modules=["q_proj"]))
    return model


def _prompt(model, *_):
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(model, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))


def _accelerated(model, *_):
    return pytest.importorskip("accelerate").Accelerator(cpu=True).prepare(model)


def _compiled(model, *_):
    return torch.compile(model)


WRAPPERS = {
    "plain": [],
    "compiled": [_compiled],
    "distributed": [_frozen, _distributed],
    "accelerated": [_accelerated],
    "lora": [_lora],
    "own lora": [_own_lora],
    "prompt": [_prompt],
    "lora, and some tokens": [_token_lora],
    "all at once": [_lora, _frozen, _compiled, _distributed],
}


@pytest.mark.parametrize("wrapping", WRAPPERS)
def test_only_new_layers_train_in_a_loop_of_ones_own(deeper, tmp_path, wrapping):
    """Through every wrapper the same tensors train; a step changes all of them, and no other of the model's own."""
    model = wrapped = load(deeper)
    own = dict(model.named_parameters())  # peft renames them, but they stay the same objects
    for wrap in WRAPPERS[wrapping]:
        wrapped = wrap(wrapped, tmp_path, deeper)
    done = training.freeze_base(wrapped, deeper)
    assert training.freeze_base(wrapped, deeper) == done
    new = training.new_parameters(deeper)
    assert {name for name, p in own.items() if p.requires_grad} == set(new)
    assert (done.layers, done.trained_tensors, done.frozen_tensors) == ((2, 4), len(new), len(own) - len(new))
    assert done.trained_parameters == sum(own[name].numel() for name in new)
    assert done.frozen_parameters == sum(p.numel() for p in own.values()) - done.trained_parameters
    assert bool(done.added_tensors) is ("lora" in wrapping or wrapping in ("prompt", "all at once"))

    watch = training.Watch(wrapped, deeper)
    groups = training.optimizer_groups(wrapped, deeper, lr=1e-2, zeroed_lr=2e-2, weight_decay=0.1)
    named = {g["name"]: g for g in groups}
    assert {id(own[n]) for n in new if n.endswith(("o_proj.weight", "down_proj.weight"))} == {
        id(p) for p in named["zeroed"]["params"]
    }
    assert (named["zeroed"]["lr"], named["vectors"]["weight_decay"]) == (2e-2, 0.0)
    optimizer = torch.optim.AdamW(groups)
    before = {name: p.detach().clone() for name, p in own.items()}
    for _ in range(2):  # while o and down are zero, only they have a gradient
        with torch.compiler.set_stance("force_eager"):  # compiling takes seconds and is not what is looked at
            wrapped(input_ids=IDS, labels=IDS).loss.backward()
        gradients = watch.gradient_norms(per_layer=True)
        optimizer.step()
        optimizer.zero_grad()
    assert gradients["new_layers/grad_norm"] > gradients["new_layers/2/grad_norm"] > 0
    assert watch.norms()["new_layers/zeroed_norm"] > 0
    assert watch.check() == done.frozen_tensors
    assert changed(before, own) == set(new)
    with torch.no_grad():
        own["model.layers.1.mlp.up_proj.weight"][0, 0] += 1e-6
    with pytest.raises(TrainingError, match="frozen weight has changed") as caught:
        watch.check()
    assert caught.value.where == "model.layers.1.mlp.up_proj.weight"


def another(deeper: Path, **settings):
    config = transformers.AutoConfig.from_pretrained(deeper)
    return transformers.AutoModelForCausalLM.from_config(type(config)(**(config.to_dict() | settings)))


def quantised(deeper: Path):
    model = load(deeper)
    layer = model.model.layers[2].mlp.up_proj
    layer.weight = torch.nn.Parameter(layer.weight.detach().to(torch.int8), requires_grad=False)
    return model


def sharing(deeper: Path):
    model = load(deeper)
    model.model.layers[2].mlp.up_proj.weight = model.model.layers[1].mlp.up_proj.weight
    return model


# fmt: off
STRANGERS = {
    "fewer layers": (lambda d: another(d, num_hidden_layers=4), "18 missing, first model.layers.4."),
    "more layers": (lambda d: another(d, num_hidden_layers=7), "9 more, first model.layers.6."),
    "adapters on more layers": (lambda d: _lora(another(d, num_hidden_layers=7)), "more, first base_model.model"),
    "untied": (lambda d: another(d, tie_word_embeddings=False), "1 more, first lm_head.weight"),
    "a classifier": (lambda d: transformers.AutoModelForSequenceClassification.from_config(load(d).config), "score.we"),
    "another family": (lambda d: transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=8, n_head=2, n_layer=1)),
                       "56 missing, first model.embed_tokens.weight"),
    "quantised": (quantised, "cannot be trained"),
    "a tied new tensor": (sharing, "tied to one that must stay frozen"),
}
# fmt: on


def test_new_layers_that_peft_is_to_save(run, deeper, tmp_path):
    """Named in modules_to_save, the copies that peft trains and saves are the new layers; the adapter holds them, and
    the deeper model with the adapter is the trained one."""
    peft = pytest.importorskip("peft")
    done = training.freeze_base(_lora(load(deeper)), deeper)
    assert done.unsaved == ("model.layers.2", "model.layers.4")
    assert "modules_to_save=['model.layers.2', 'model.layers.4']" in str(done)
    torch.manual_seed(0)
    adapted, saved = r".*layers\.[01]\.self_attn\.q_proj", ["layers.2", "layers.4"]
    model = peft.get_peft_model(load(deeper), peft.LoraConfig(target_modules=adapted, modules_to_save=saved))
    done = training.freeze_base(model, deeper)
    new = training.new_parameters(deeper)
    assert (done.trained_tensors, done.added_tensors, done.unsaved) == (len(new), 4, ())
    groups = {g["name"]: g for g in training.optimizer_groups(model, deeper, lr=1e-2, zeroed_lr=2e-2)}
    assert (len(groups["zeroed"]["params"]), len(groups["added"]["params"])) == (4, 4)
    watch = training.Watch(model, deeper)
    optimizer = torch.optim.AdamW(groups.values())
    for _ in range(2):
        model(input_ids=IDS, labels=IDS).loss.backward()
        assert watch.gradient_norms()["new_layers/grad_norm"] > 0
        optimizer.step()
        optimizer.zero_grad()
    assert watch.norms()["new_layers/zeroed_norm"] > 0 and watch.check() == done.frozen_tensors
    model.save_pretrained(tmp_path / "adapter")
    recipe = tmp_path / "whole.yml"
    recipe.write_text(f"merge_method: passthrough\nmodels: [{{model: {deeper}+{tmp_path / 'adapter'}}}]\n")
    run("merge", recipe, tmp_path / "whole")
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
        assert torch.allclose(load(tmp_path / "whole")(input_ids=IDS).logits, expected, atol=1e-5)


def test_copies_of_peft_that_are_not_all_or_not_used(deeper):
    """Of layers that are saved in part the rest is told; of several adapters the one in use counts."""
    peft = pytest.importorskip("peft")
    part = peft.get_peft_model(load(deeper), peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["mlp"]))
    assert training.freeze_base(part, deeper).unsaved == ("model.layers.2", "model.layers.4")
    config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["layers.2", "layers.4"])
    both = peft.get_peft_model(load(deeper), config)
    both.add_adapter("other", config)
    assert training.freeze_base(both, deeper).unsaved == ()
    watch = training.Watch(both, deeper)
    both(input_ids=IDS, labels=IDS).loss.backward()
    assert watch.gradient_norms()["new_layers/grad_norm"] > 0


def test_a_training_that_would_lose_or_forget_the_new_layers(deeper, tmp_path):
    """Checkpoints of peft without them; a model that peft froze once more; an adapter in place of the model."""
    model = _lora(load(deeper))
    training.freeze_base(model, deeper)
    made = trainer(model, tmp_path / "saves")
    training.watch(made, deeper)
    with pytest.raises(TrainingError, match="peft saves adapters alone") as caught:
        made.train()
    assert "modules_to_save=['model.layers.2', 'model.layers.4']" in str(caught.value)
    made.args.save_strategy = "no"
    made.train()
    made.save_model(tmp_path / "adapter")
    with pytest.raises(TrainingError, match="an adapter, not the model"):
        training.carry_manifest(deeper, tmp_path / "adapter")
    model.merge_and_unload().save_pretrained(tmp_path / "whole")
    training.carry_manifest(deeper, tmp_path / "whole")

    model = load(deeper)
    training.freeze_base(model, deeper)
    with pytest.raises(TrainingError, match="none of the new layers trains"):
        training.Watch(_lora(model), deeper)


def test_a_manifest_of_another_place(deeper, tmp_path):
    """As many layers, the new ones elsewhere: what is new in the model would be frozen, and is zero."""
    other = grow(deeper.parent / "base", tmp_path / "other", insert={"after": [0, 1]})
    checked = tmp_path / "checked"  # with checksums
    api.merge(api.upscale_recipe(deeper.parent / "base", insert={"after": [0, 1]}), checked)
    with pytest.raises(TrainingError, match="the manifest is another model's") as caught:
        training.freeze_base(load(deeper), checked)
    assert caught.value.where.startswith("model.layers.2.")
    training.freeze_base(load(deeper), other)  # made with --no-verify: nothing to tell it by
    empty = load(deeper)
    for parameter in empty.parameters():
        parameter.data.zero_()
    training.freeze_base(empty, checked)  # weights that are to come from another process
    for wrong in ("a folder", None):
        with pytest.raises(TrainingError, match="not a model"):
            training.freeze_base(wrong, deeper)


def test_where_a_manifest_can_be_carried(deeper, tmp_path):
    base, other = deeper.parent / "base", grow(deeper.parent / "base", tmp_path / "other", insert={"after": [0, 1]})
    before = (other / "deus_merge.json").read_bytes()
    with pytest.raises(CheckpointError, match="no model to carry a manifest to"):
        training.carry_manifest(deeper, tmp_path / "mistyped")
    with pytest.raises(CheckpointError, match="not this checkpoint's"):
        training.carry_manifest(deeper, base)
    with pytest.raises(TrainingError, match="the manifest of another model"):
        training.carry_manifest(deeper, other)
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="no model"):
        training.carry_manifest(deeper, tmp_path / "file")
    assert not (tmp_path / "mistyped").exists() and not (base / "deus_merge.json").exists()
    assert (other / "deus_merge.json").read_bytes() == before


def test_a_manifest_replaces_another_where_the_model_did(run, deeper, tmp_path):
    """Two trainings into one folder, and one in place: the manifest is that of the weights."""
    other = grow(deeper.parent / "base", tmp_path / "other", insert={"after": [0, 1]})
    for out in (deeper, other):
        model = load(out)
        training.freeze_base(model, out)
        made = trainer(model, tmp_path / "runs")
        training.watch(made, out)
        made.train()
    saved = tmp_path / "runs/checkpoint-4"
    assert training.new_parameters(saved) == training.new_parameters(other)
    assert (saved / "deus_merge.yml").read_bytes() == (other / "deus_merge.yml").read_bytes()
    model.save_pretrained(other, max_shard_size="60KB")  # many files now
    (other / "model.safetensors").unlink()
    training.carry_manifest(other, other)
    assert run("verify", other, "--json").json()["passed"]
    (other / "deus_merge.json").write_text("{}")
    training.carry_manifest(saved, other)  # a damaged one says nothing


def test_an_earlier_growth_is_trained_and_a_tied_head_saved_once(run, deeper, tmp_path):
    """What any growth put in may have changed; the copy of the embeddings that a base had as its head may be gone."""
    base = make_model(tmp_path / "base", tied=True)
    tensors = weights(base)
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, base / "model.safetensors")
    once = grow(base, tmp_path / "once", insert={"after": [1]})
    twice = grow(once, tmp_path / "twice", insert={"after": [0]})
    model = load(twice)
    training.freeze_base(model, twice, generation=0)
    with torch.no_grad():
        model.model.layers[3].mlp.down_proj.weight += 0.1
    model.save_pretrained(tmp_path / "trained")
    assert "lm_head.weight" in weights(twice) and "lm_head.weight" not in weights(tmp_path / "trained")
    training.carry_manifest(twice, tmp_path / "trained")
    assert run("verify", tmp_path / "trained", "--json").json()["passed"]
    told = run("strip", tmp_path / "trained", tmp_path / "back", "--json").json()
    assert told["manifest"] is True and json.loads((tmp_path / "back/deus_merge.json").read_text())["trained"] is True
    assert run("verify", tmp_path / "back", "--json").json()["passed"]


def test_training_in_another_dtype(run, tmp_path):
    """bfloat16 weights are told; a model saved in float32 holds its base's values, and in float16 it does not."""
    out = grow(make_model(tmp_path / "base", tied=True, dtype=torch.bfloat16), tmp_path / "deeper")
    model = load(out).to(torch.bfloat16)
    assert "in bfloat16 small steps are lost" in str(training.freeze_base(model, out))
    assert "small steps" not in str(training.freeze_base(load(out), out))
    for dtype in (torch.float32, torch.float16):
        model.to(dtype).save_pretrained(tmp_path / str(dtype))
        training.carry_manifest(out, tmp_path / str(dtype))
    wide, narrow = tmp_path / "torch.float32", tmp_path / "torch.float16"
    checks = {c["name"]: c for c in run("verify", wide, "--json").json()["checks"]}
    assert "in a wider dtype" in checks["copied tensors"]["detail"]
    assert checks["tensors against the plan"]["detail"].endswith("names, shapes; now float32")
    told = run("verify", narrow, expect=3).out
    assert "it is float16, its source bfloat16" in told
    done = run("strip", wide, tmp_path / "back", "--json").json()
    assert (done["equal_to_base"], done["different"], done["widened"]) == (0, [], len(weights(tmp_path / "base")))
    tensors = weights(wide)
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] *= 1 + 2**-20
    save_file(tensors, wide / "model.safetensors", {"format": "pt"})
    assert "model.layers.0.mlp.up_proj.weight" in run("verify", wide, expect=3).out


def test_too_late_for_distributed_training(deeper, tmp_path):
    with pytest.raises(TrainingError, match="already noted what trains"):
        training.freeze_base(_distributed(load(deeper), tmp_path, deeper), deeper)


@pytest.mark.parametrize("stranger", STRANGERS)
def test_another_model_is_refused_and_left_alone(deeper, stranger):
    make, told = STRANGERS[stranger]
    model = make(deeper)
    before = [p.requires_grad for p in model.parameters()]
    with pytest.raises(TrainingError) as caught:
        training.freeze_base(model, deeper)
    assert told in str(caught.value)
    assert [p.requires_grad for p in model.parameters()] == before


def test_headless_models_and_heads_of_their_own(tmp_path):
    """Untied embeddings: the head is frozen as well, and a model without it is another one."""
    out = grow(make_model(tmp_path / "base", tied=False), tmp_path / "out", insert={"after": [0]})
    model = load(out)
    assert training.freeze_base(model, out).layers == (1,) and not model.lm_head.weight.requires_grad
    with pytest.raises(TrainingError, match="not the one of the manifest"):
        training.freeze_base(model.model, out)


def test_what_cannot_be_asked_of_a_manifest(deeper, tmp_path):
    assert training.new_parameters(deeper / "deus_merge.json", 0) == training.new_parameters(deeper)
    with pytest.raises(TrainingError, match="no such generation"):
        training.new_parameters(deeper, 1)
    with pytest.raises(CheckpointError, match="no manifest"):
        training.new_parameters(tmp_path)
    with pytest.raises(TrainingError, match="nothing of this model trains"):
        training.optimizer_groups(load(deeper).requires_grad_(False), deeper, lr=1.0)
    with pytest.raises(TrainingError, match="a weight of the base would train"):
        training.Watch(load(deeper), deeper)
    old = json.loads((deeper / "deus_merge.json").read_text()) | {"format": 1}
    del old["layer_prefix"]
    (tmp_path / "old.json").write_text(json.dumps(old))
    with pytest.raises(CheckpointError, match="lacks 'layer_prefix'") as caught:
        training.new_parameters(tmp_path / "old.json")
    assert "make the output again" in str(caught.value)
    same = tmp_path / "same.yml"
    same.write_text(f"merge_method: passthrough\nmodels: [{{model: {deeper.parent / 'base'}}}]\n")
    api.merge(same, tmp_path / "same")
    with pytest.raises(TrainingError, match="no new layer to train"):
        training.freeze_base(load(tmp_path / "same"), tmp_path / "same")


def test_names_need_neither_torch_nor_transformers(deeper):
    code = "import sys; from deus_merge import training; print(*training.new_parameters(sys.argv[1]), sep='\\n');"
    code += "assert not {'torch', 'transformers'} & sys.modules.keys()"
    done = subprocess.run([sys.executable, "-c", code, deeper], capture_output=True, text=True, check=True)
    assert done.stdout.split() == list(training.new_parameters(deeper))


# the Trainer ---------------------------------------------------------------------------------------------------------


class Listener(transformers.TrainerCallback):
    """What TensorBoard and its like get to see; and, when told, something that writes to frozen weights."""

    def __init__(self, spoil: torch.Tensor | None = None):
        self.seen, self.spoil = [], spoil

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.seen.append(dict(logs))

    def on_step_end(self, args, state, control, **kwargs):
        if self.spoil is not None and state.global_step == 2:
            self.spoil.data.mul_(1.001)


def trainer(model, folder: Path, *callbacks) -> transformers.Trainer:
    return transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(
            output_dir=str(folder), max_steps=4, logging_steps=2, save_steps=4, report_to="none", disable_tqdm=True,
            learning_rate=1e-2,
        ),
        train_dataset=[{"input_ids": IDS[0], "labels": IDS[0]}] * 8,
        callbacks=list(callbacks),
    )  # fmt: skip


def test_callback_logs_checks_and_carries_the_manifest(deeper, tmp_path, run):
    model = load(deeper)
    training.freeze_base(model, deeper)
    listener = Listener()
    made = trainer(model, tmp_path, listener)
    training.watch(made, deeper, check_every=1, per_layer=True)
    made.train()
    logged = [entry for entry in listener.seen if "loss" in entry]
    assert [entry for entry in made.state.log_history if "loss" in entry] == [
        entry | {"step": step} for entry, step in zip(logged, (2, 4), strict=True)
    ]
    for what in ("norm", "zeroed_norm", "grad_norm", "2/norm", "4/grad_norm"):
        assert all(entry[f"new_layers/{what}"] > 0 for entry in logged), what
    assert logged[0]["new_layers/zeroed_norm"] < logged[1]["new_layers/zeroed_norm"]
    for entry in logged:  # nothing else trains, and the Trainer clips to 1
        assert entry["new_layers/grad_norm"] == pytest.approx(min(1.0, entry["grad_norm"]), rel=1e-3)

    saved = tmp_path / "checkpoint-4"
    assert training.new_parameters(saved) == training.new_parameters(deeper)
    checked = run("verify", saved, "--json").json()
    assert checked["passed"] and {c["name"]: c["passed"] for c in checked["checks"]}["copied tensors"] is True
    run("strip", saved, tmp_path / "base")
    assert not changed(weights(deeper.parent / "base"), weights(tmp_path / "base"))


@pytest.mark.parametrize("check_every", [0, 1])
def test_callback_stops_when_a_frozen_weight_changes(deeper, tmp_path, check_every):
    model = load(deeper)
    training.freeze_base(model, deeper)
    spoilt = model.model.layers[3].self_attn.k_proj.weight
    made = trainer(model, tmp_path, Listener(spoilt))
    training.watch(made, deeper, check_every=check_every)
    with pytest.raises(TrainingError, match="frozen weight has changed") as caught:
        made.train()
    assert caught.value.where == "model.layers.3.self_attn.k_proj.weight"
    assert made.state.global_step == (3 if check_every else 4)
    with pytest.raises(TrainingError, match="would train"):
        trainer(load(deeper), tmp_path, training.NewLayersCallback(deeper)).train()


# other trainers' settings --------------------------------------------------------------------------------------------


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
FACTORY = {  # preset, where, and what LLaMA-Factory is told: every k-th layer, the last, the first; or nothing
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
        told = run("export-training", out, "--for", "llama-factory", expect=2).err
        assert "LLaMA-Factory cannot be told" in told and expected in told
        every = yaml.safe_load(expected)
        again = grow(tmp_path / "base", tmp_path / "again", "llama_pro", every)
        settings = yaml.safe_load(run("export-training", again, "--for", "llama-factory").out)
        assert settings["use_llama_pro"] is True and settings["freeze_trainable_layers"] == 12 // every["every"]
        return
    settings = yaml.safe_load(run("export-training", out, "--for", "llama-factory").out)
    common = {"model_name_or_path": str(out), "finetuning_type": "freeze", "freeze_trainable_modules": "all"}
    assert settings == common | expected


def test_settings_that_there_are_none_for(run, deeper, tmp_path):
    told = run("export-training", deeper, "--for", "torchtune", expect=2).err
    assert "torchtune cannot be told" in told and "new layers 2, 4" in told
    assert "llama-factory" in run("export-training", deeper, "--for", "unsloth", expect=2).err
    gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=8, n_head=2, n_layer=2, vocab_size=32))
    gpt2.save_pretrained(tmp_path / "gpt2")
    out = grow(tmp_path / "gpt2", tmp_path / "out", "stack", None)
    told = run("export-training", out, "--for", "axolotl", expect=2).err
    assert "model_type 'gpt2'" in told and "--for trainer" in told
    model = load(out)
    assert training.freeze_base(model, out).layers == (2, 3)


# the examples --------------------------------------------------------------------------------------------------------


def texts(folder: Path) -> tuple[Path, Path]:
    """Python's own words, as text and as conversations."""
    import argparse
    import inspect
    import pathlib

    text, talks = folder / "text.txt", folder / "talks.jsonl"
    text.write_text(inspect.getsource(argparse)[:50_000])
    pairs = [
        (f"What does {module.__name__}.{name} do?", doc[:200])
        for module in (argparse, pathlib.Path)
        for name, member in vars(module).items()
        if callable(member) and (doc := inspect.getdoc(member))
    ]
    lines = [{"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]} for q, a in pairs]
    talks.write_text("\n".join(map(json.dumps, lines)))
    return text, talks


def check_example(run, script: str, base: Path, tmp_path: Path, *options: object) -> Path:
    """It learns, in the new layers alone; the result loads, and the base comes out of it, byte for byte."""
    out = grow(base, tmp_path / "deeper", "copy_next", {"count": 2, "where": "top"})
    source = texts(tmp_path)[script == "sft"]
    main = runpy.run_path(str(RECIPES / f"{script}.py"))["main"]
    trained = tmp_path / "trained"
    losses = main([str(x) for x in (out, source, "--out", trained, *options)])
    assert losses["after"] < losses["before"] - 0.005
    new = set(training.new_parameters(trained))
    assert changed(weights(out), weights(trained)) == new  # the frozen ones have their bytes
    assert all(weights(trained)[n].any() for n in new)
    assert load(trained).config.num_hidden_layers == load(out).config.num_hidden_layers
    assert run("verify", trained, "--json").json()["passed"]
    told = run("strip", trained, tmp_path / "back", "--json").json()
    assert told["different"] == [] and told["equal_to_base"] == len(weights(base))
    assert (tmp_path / "back/model.safetensors").read_bytes() == (base / "model.safetensors").read_bytes()
    return trained


def test_continual_pre_training_and_growing_on(run, tiny, tmp_path):
    options = ("--steps", 12, "--context", 96, "--lr", 5e-3)
    trained = check_example(run, "continual", tiny, tmp_path, *options)  # new: 4 and 6
    again = grow(trained, tmp_path / "again", insert={"after": [0, 4]})  # 8 layers become 10, new: 1 and 6
    record = json.loads((again / "deus_merge.json").read_text())
    first, second = record["lineage"]
    assert (first["new_layers"], first["trained"]) == ([5, 8], True)
    assert (second["new_layers"], second["trained"]) == ([1, 6], False)
    assert first["plan_hash"] == json.loads((trained / "deus_merge.json").read_text())["plan_hash"]
    assert second["plan_hash"] == record["plan_hash"] and second["recipe"] == record["files"]["deus_merge.yml"]
    assert training.new_parameters(again) == tuple(record["new_parameters"])
    older = training.new_parameters(again, generation=0)
    assert {name.split(".")[2] for name in older} == {"5", "8"} and len(older) == 18
    assert run("inspect", again, "--json").json()["grown"] == "5, 8 (trained); then 1, 6"
    model = load(again)
    assert training.freeze_base(model, again, generation=0).layers == (5, 8)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == set(older)
    assert "layers 5, 8, then trained, by plan" in (again / "README.md").read_text()
    told = run("strip", again, tmp_path / "once").err
    assert not changed(weights(trained), weights(tmp_path / "once")) and "can be stripped again" in told
    assert run("verify", tmp_path / "once", "--json").json()["passed"]
    told = run("strip", tmp_path / "once", tmp_path / "twice", "--json").json()
    assert (told["equal_to_base"], told["manifest"]) == (len(weights(tiny)), None)
    trained.rename(tmp_path / "moved")
    assert "name one with --manifest" in run("strip", again, tmp_path / "alone").err
    assert (tmp_path / "twice/model.safetensors").read_bytes() == (tiny / "model.safetensors").read_bytes()


def test_supervised_fine_tuning(run, tiny, tmp_path):
    pytest.importorskip("trl")
    trained = check_example(run, "sft", tiny, tmp_path, "--steps", 12, "--context", 96, "--lr", 5e-3)
    assert "assistant:" in transformers.AutoTokenizer.from_pretrained(trained).chat_template


@pytest.mark.slow
def test_continual_pre_training_of_smollm2(run, real, tmp_path):
    check_example(run, "continual", real, tmp_path, "--steps", 4, "--batch", 1, "--context", 64)


def test_an_unreadable_past_is_told_and_does_no_harm(run, deeper, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for file in deeper.iterdir():
        os.link(file, source / file.name)
    record = json.loads((deeper / "deus_merge.json").read_text()) | {"format": 1}
    for name, content in {
        "another depth": record | {"num_layers": 5},
        "another format": record | {"format": 99},
        "no layers": {k: v for k, v in record.items() if k != "new_layers"},
        "odd lineage": record | {"lineage": [[], []]},
    }.items():
        (source / "deus_merge.json").unlink()
        (source / "deus_merge.json").write_text(json.dumps(content))
        out = tmp_path / name
        done = run("upscale", source, out, "--insert", "{after: [0]}", "--preset", "copy_next")
        assert "the lineage of" in done.err and "is lost" in done.err, name
        assert "lineage" not in json.loads((out / "deus_merge.json").read_text())
