"""The callback of transformers' Trainer."""

from __future__ import annotations

import pytest
import torch
import transformers
from grown import changed, trainer
from support import load, weights

from deus_merge import training
from deus_merge.core.errors import TrainingError


class Listener(transformers.TrainerCallback):
    """What TensorBoard and its like get to see; and, on request, writes to frozen weights."""

    def __init__(self, spoil: torch.Tensor | None = None):
        self.seen, self.spoil = [], spoil

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.seen.append(dict(logs))

    def on_step_end(self, args, state, control, **kwargs):
        if self.spoil is not None and state.global_step == 2:
            self.spoil.data.mul_(1.001)


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
