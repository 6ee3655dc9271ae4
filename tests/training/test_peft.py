"""New layers and adapters: which train, and which are saved."""

from __future__ import annotations

import pytest
import torch
from grown import IDS, lora, trainer
from support import load

from deus_merge import training
from deus_merge.core.errors import TrainingError


def test_new_layers_that_peft_is_to_save(run, deeper, tmp_path):
    """Named in modules_to_save, the copies that peft trains and saves are the new layers; the adapter holds them, and
    the deeper model with the adapter is the trained one."""
    peft = pytest.importorskip("peft")
    done = training.freeze_base(lora(load(deeper)), deeper)
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
    """Layers that are saved in part are reported; of several adapters, the active one counts."""
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
    model = lora(load(deeper))
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
    with pytest.raises(TrainingError, match="no new layer trains"):
        training.Watch(lora(model), deeper)
