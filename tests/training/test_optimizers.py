"""Optimizers of new layers: which parameter has which rate and which rule, through loops, trainers and checkpoints."""

from __future__ import annotations

import copy
import io
import math
import pickle

import pytest
import tiny_models
import torch
import transformers
from grown import IDS, grow, lora, trainer
from support import load, make_model
from torch.optim.lr_scheduler import LambdaLR

from deus_merge import training
from deus_merge.core.errors import TrainingError
from deus_merge.training.muon import MuonAdamW

WRITERS = ("o_proj.weight", "down_proj.weight", "o_proj.bias", "down_proj.bias")
NORMS = ("norm.weight",)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_every_new_parameter_has_its_rate_its_decay_and_its_rule(kind, tmp_path):
    """By names alone: o and down began as zeros, their biases too; norms and biases are vectors; LoRA is not ours."""
    out = grow(make_model(tmp_path / "base", "llama_bias"), tmp_path / "out")
    model = load(out)
    wrapped = lora(model)
    training.freeze_base(wrapped, out)
    names = {id(p): name.replace(".base_layer", "") for name, p in wrapped.named_parameters() if p.requires_grad}
    optimizer = training.optimizer(wrapped, out, kind=kind, lr=1e-3, output_ratio=3.0, weight_decay=0.1)
    found = {names[id(p)]: group for group in optimizer.param_groups for p in group["params"]}
    assert len(found) == len(names) == sum(len(group["params"]) for group in optimizer.param_groups)
    assert sum(".layers.2." in name and "lora" not in name for name in found) == 16
    for name, group in found.items():
        ours = "lora" not in name
        vector = name.endswith((".bias", *NORMS))
        assert group["lr"] == pytest.approx(3e-3 if ours and name.endswith(WRITERS) else 1e-3), name
        assert group["weight_decay"] == (0.0 if ours and vector else 0.1), name
        if kind == "muon":
            assert group["algorithm"] == ("muon" if ours and not vector else "adamw"), name
    assert optimizer.param_groups[0]["lr"] == 1e-3  # what the Trainer logs


# fmt: off
MATRICES = {  # a parameter, and its matrices, by slices of it that share its memory or not
    "llama": ("self_attn.q_proj.weight", lambda p: [p]),
    "gpt2": ("attn.c_attn.weight", lambda p: [p[:, i : i + 32].T for i in (0, 32, 64)]),
    "phi3": ("self_attn.qkv_proj.weight", lambda p: [p[:32], p[32:48], p[48:]]),
    "gpt_neox": (".query_key_value.weight", lambda p: [*p.view(4, 3, 8, 32).swapaxes(0, 1).reshape(3, 32, 32)]),
    "qwen3_moe": ("mlp.experts.gate_up_proj", lambda p: [half for one in p for half in (one[:24], one[24:])]),
    "gpt_oss": ("mlp.experts.gate_up_proj", lambda p: [part for one in p for part in (one[:, ::2].T, one[:, 1::2].T)]),
}
# fmt: on
OTHERS = {"mamba": ("A_log", "conv1d.weight"), "lfm2": ("conv.conv.weight",), "gpt_oss": ("gate_up_proj_bias",)}


@pytest.mark.parametrize("kind", sorted({*MATRICES, *OTHERS}))
def test_muon_orthogonalises_each_matrix_by_itself(kind, tmp_path):
    """torch's Muon on copies of the matrices does the same, step by step; what is no matrix is left to AdamW."""
    out = grow(tiny_models.make(tmp_path / "base", kind), tmp_path / "out", "copy_next", {"after": [0]})
    model = load(out)
    training.freeze_base(model, out)
    optimizer = training.optimizer(model, out, kind="muon", lr=1e-2, weight_decay=0.1)
    by_muon = {id(p) for group in optimizer.param_groups if group["algorithm"] == "muon" for p in group["params"]}
    for suffix in OTHERS.get(kind, ()):
        left = [p for name, p in model.named_parameters() if name.endswith(suffix) and p.requires_grad]
        assert left and by_muon.isdisjoint(map(id, left)), suffix
    suffix, cut = MATRICES.get(kind, (None, None))
    if cut is None:
        return
    (parameter,) = (p for name, p in model.named_parameters() if name.endswith(suffix) and p.requires_grad)
    copies = [matrix.detach().clone() for matrix in cut(parameter.detach())]
    alone = torch.optim.Muon(copies, lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    draw = torch.Generator().manual_seed(0)
    for _ in range(3):
        gradient = 1e-3 * torch.randn(parameter.shape, generator=draw)
        parameter.grad = gradient
        for matrix, part in zip(copies, cut(gradient), strict=True):
            matrix.grad = part.contiguous()
        before = [matrix.clone() for matrix in cut(parameter.detach())]
        optimizer.step()
        alone.step()
    for matrix, old, expected in zip(cut(parameter.detach()), before, copies, strict=True):
        torch.testing.assert_close(matrix, expected, atol=2e-4, rtol=0)  # its products are bfloat16
        size = (matrix - old * (1 - 1e-3)).norm() / math.sqrt(matrix.numel())
        assert size == pytest.approx(0.2 * 1e-2, rel=0.2)  # as large as AdamW's, whatever the gradients


def test_what_muon_leaves_is_updated_by_torchs_adamw(deeper):
    model, plain = load(deeper), load(deeper)
    for each in (model, plain):
        training.freeze_base(each, deeper)
    settings = {"lr": 1e-2, "betas": (0.8, 0.9), "eps": 1e-6}
    steps = [training.optimizer(model, deeper, kind="muon", **settings), training.optimizer(plain, deeper, **settings)]
    for group in (group for optimizer in steps for group in optimizer.param_groups):
        group["weight_decay"] = 0.1
    draw = torch.Generator().manual_seed(0)
    for _ in range(3):
        for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
            ours.grad = theirs.grad = torch.randn(ours.shape, generator=draw) if ours.requires_grad else None
        for optimizer in steps:
            optimizer.step()
    expected = dict(plain.named_parameters())
    alike = {name for name, p in model.named_parameters() if p.requires_grad and torch.equal(p, expected[name])}
    assert alike == {name for name in training.new_parameters(deeper) if name.endswith(NORMS)}


def prepared(model, optimizer, scheduler):
    accelerate = pytest.importorskip("accelerate")
    return accelerate.Accelerator(cpu=True).prepare(model, optimizer, scheduler)


LOOPS = {"plain": lambda *parts: parts, "accelerate": prepared}


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_resumed_loop_ends_with_the_same_bits(kind, loop, deeper):
    """A schedule keeps the ratio; clipping, a saved state, a pickled optimizer; the base stays."""

    def begin():
        model = load(deeper)
        training.freeze_base(model, deeper)
        optimizer = training.optimizer(model, deeper, kind=kind, lr=1e-2, output_ratio=3.0, weight_decay=0.1)
        return LOOPS[loop](model, optimizer, LambdaLR(optimizer, lambda step: 1 / (1 + step)))

    def train(model, optimizer, scheduler, steps):
        for _ in range(steps):
            model(input_ids=IDS, labels=IDS).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
            assert rates["zeroed"] == pytest.approx(3 * rates["matrices"])
            assert rates["matrices"] == rates["vectors"] == scheduler.get_last_lr()[0]
        return rates

    whole = begin()
    first = train(*whole, 1)["matrices"]
    assert train(*whole, 3)["matrices"] < first
    parts = begin()
    train(*parts, 2)
    saved = io.BytesIO()
    torch.save([part.state_dict() for part in parts], saved)
    saved.seek(0)
    resumed = begin()
    for part, state in zip(resumed, torch.load(saved, weights_only=True), strict=True):
        part.load_state_dict(state)
    train(*resumed, 2)
    expected = whole[0].state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in resumed[0].state_dict().items())
    assert any(state for state in resumed[1].state.values())
    if loop == "plain":
        again = pickle.loads(pickle.dumps(copy.deepcopy(whole[1])))
        again.step()  # without gradients
        assert (
            type(again) is type(whole[1])
            and again.state_dict()["param_groups"] == whole[1].state_dict()["param_groups"]
        )


class Rates(transformers.TrainerCallback):
    def __init__(self):
        self.seen: list[dict[str, float]] = []

    def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
        self.seen.append({group["name"]: group["lr"] for group in optimizer.param_groups})


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_the_trainer_schedules_saves_and_resumes(kind, deeper, tmp_path):
    def begin(folder, steps=4):
        model = load(deeper)
        training.freeze_base(model, deeper)
        made = trainer(model, folder, rates := Rates())
        made.args.save_steps, made.args.max_steps, made.args.lr_scheduler_type = 2, 4, transformers.SchedulerType.LINEAR
        made.optimizer = training.optimizer(model, deeper, kind=kind, lr=1e-2, output_ratio=3.0)
        training.watch(made, deeper, check_every=1)
        return made, rates

    made, rates = begin(tmp_path / "whole")
    made.train()
    assert [rate["matrices"] for rate in rates.seen] == pytest.approx([1e-2, 7.5e-3, 5e-3, 2.5e-3])
    assert all(rate["zeroed"] == pytest.approx(3 * rate["vectors"]) for rate in rates.seen)
    resumed, later = begin(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert later.seen == rates.seen[2:]
    expected = made.model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in resumed.model.state_dict().items())


# fmt: off
REFUSED = {
    "another optimizer": ({"lr": 1e-3, "kind": "mouon"}, "did you mean|muon"),
    "no rate": ({"lr": 0.0}, "not a rate"),
    "a ratio that is not": ({"lr": 1e-3, "output_ratio": float("nan")}, "not a rate"),
    "two rates for one": ({"lr": 1e-3, "output_ratio": 2.0, "zeroed_lr": 1e-5}, "two rates"),
}
# fmt: on


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case, deeper):
    settings, message = REFUSED[case]
    model = load(deeper)
    training.freeze_base(model, deeper)
    with pytest.raises(TrainingError, match=message):
        training.optimizer(model, deeper, **settings)


def test_muon_without_torchs_and_on_shards(deeper, monkeypatch):
    """An old torch; a parameter that the optimizer has not seen whole, as accelerate's FSDP puts them into groups."""
    model = load(deeper)
    training.freeze_base(model, deeper)
    optimizer = training.optimizer(model, deeper, kind="muon", lr=1e-3)
    assert isinstance(optimizer, MuonAdamW)
    shard = torch.nn.Parameter(torch.zeros(3, 4))
    shard.grad = torch.ones(3, 4)
    optimizer.param_groups[0]["params"] = [shard]
    with pytest.raises(TrainingError, match="this one is sharded"):
        optimizer.step()
    monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(TrainingError, match="no Muon") as caught:
        training.optimizer(model, deeper, kind="muon", lr=1e-3)
    assert "torch 2.9 or newer" in str(caught.value)
    training.optimizer(model, deeper, lr=1e-3)
