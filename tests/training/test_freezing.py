"""What trains is what is new, whatever the model is wrapped in."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from grown import IDS, changed, grow, lora
from support import load, make_model

from deus_merge import api, training
from deus_merge.core.errors import CheckpointError, TrainingError


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
    "lora": [lora],
    "own lora": [_own_lora],
    "prompt": [_prompt],
    "lora, and some tokens": [_token_lora],
    "all at once": [lora, _frozen, _compiled, _distributed],
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
    "adapters on more layers": (lambda d: lora(another(d, num_hidden_layers=7)), "more, first base_model.model"),
    "untied": (lambda d: another(d, tie_word_embeddings=False), "1 more, first lm_head.weight"),
    "a classifier": (lambda d: transformers.AutoModelForSequenceClassification.from_config(load(d).config), "score.we"),
    "another family": (lambda d: transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=8, n_head=2, n_layer=1)),
                       "56 missing, first model.embed_tokens.weight"),
    "quantised": (quantised, "cannot be trained"),
    "a tied new tensor": (sharing, "tied to one that must stay frozen"),
}
# fmt: on


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


def test_too_late_for_distributed_training(deeper, tmp_path):
    with pytest.raises(TrainingError, match="already registered the parameters"):
        training.freeze_base(_distributed(load(deeper), tmp_path, deeper), deeper)


@pytest.mark.parametrize("stranger", STRANGERS)
def test_another_model_is_refused_and_left_alone(deeper, stranger):
    make, reported = STRANGERS[stranger]
    model = make(deeper)
    before = [p.requires_grad for p in model.parameters()]
    with pytest.raises(TrainingError) as caught:
        training.freeze_base(model, deeper)
    assert reported in str(caught.value)
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
    with pytest.raises(TrainingError, match="no parameter of this model trains"):
        training.optimizer_groups(load(deeper).requires_grad_(False), deeper, lr=1.0)
    with pytest.raises(TrainingError, match="a weight of the base would train"):
        training.Watch(load(deeper), deeper)
    old = json.loads((deeper / "deus_merge.json").read_text()) | {"format": 1}
    del old["layer_prefix"]
    (tmp_path / "old.json").write_text(json.dumps(old))
    with pytest.raises(CheckpointError, match="lacks 'layer_prefix'") as caught:
        training.new_parameters(tmp_path / "old.json")
    assert "write the output again" in str(caught.value)
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
