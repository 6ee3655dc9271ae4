"""Grown models, loaded as their training needs them."""

from __future__ import annotations

from collections import Counter

import pytest
import tiny_models
import torch
import transformers
from grown import IDS, changed, grow, trainer
from quantized_checkpoints import float_model, quantized  # noqa: F401
from safetensors.torch import load_file
from support import load, make_model, weights

from deus_merge import training
from deus_merge.core.errors import TrainingError


@pytest.fixture(scope="module")
def twelve(tmp_path_factory):
    """Stored in bfloat16, tied; the numbers of new layers, 1 and 12, begin those of others: 10, 11, 12, 13."""
    folder = tmp_path_factory.mktemp("twelve")
    base = make_model(folder / "base", layers=12, tied=True, dtype=torch.bfloat16)
    return grow(base, folder / "deeper", insert={"after": [0, 10]})


def steps(model, folder, count: int = 3) -> list[float]:
    """Losses of a plain loop, which knows nothing of dtypes."""
    optimizer, losses = training.optimizer(model, folder, lr=1e-2), []
    for _ in range(count):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_a_plain_loop(twelve, tmp_path, run):
    model, tokenizer = prepared = training.prepare(twelve)
    assert tokenizer is None and prepared.trainable.layers == (1, 12) and prepared.base == "bfloat16"
    assert "small steps" not in str(prepared) and "computed in bfloat16" in str(prepared)
    new = set(training.new_parameters(twelve))
    for name, parameter in model.named_parameters():
        assert (parameter.dtype, parameter.requires_grad) == (
            (torch.float32, True) if name in new else (torch.bfloat16, False)
        )
    base = transformers.AutoModelForCausalLM.from_pretrained(twelve.parent / "base", dtype=torch.bfloat16)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        expected = base.train()(input_ids=IDS).logits
    assert torch.equal(model(input_ids=IDS).logits, expected)
    watch = training.Watch(model, twelve)
    losses = steps(model, twelve)
    assert losses[-1] < losses[0] - 0.1 and watch.check() == prepared.trainable.frozen_tensors
    assert model.generate(IDS, max_new_tokens=2, do_sample=False).shape == (1, 34)
    training.save_trained(model, twelve, tmp_path / "saved")
    assert changed(weights(twelve), weights(tmp_path / "saved")) == new
    assert run("strip", tmp_path / "saved", tmp_path / "back", "--json").json()["different"] == []


def test_values_that_bfloat16_would_round(deeper):
    """New weights that are stored in float32 begin with their stored bits, over a base in bfloat16."""
    model = training.prepare(deeper).model
    stored, found = weights(deeper), dict(model.named_parameters())
    for name in training.new_parameters(deeper):
        assert torch.equal(found[name], stored[name]), name
    old = "model.layers.3.mlp.up_proj.weight"
    assert torch.equal(found[old], stored[old].bfloat16()) and not torch.equal(found[old].float(), stored[old])
    wide = training.prepare(deeper, base="float32")
    assert not wide.autocast and torch.equal(dict(wide.model.named_parameters())[old], stored[old])
    assert wide.model(input_ids=IDS).logits.dtype == torch.float32


def computed_layers(model) -> Counter:
    """How often each layer was computed in a forward and a backward pass."""
    count: Counter = Counter()
    for number, layer in enumerate(model.model.layers):
        layer.self_attn.register_forward_hook(lambda *_, number=number: count.update([number]))
    return count


@pytest.mark.parametrize("enabled_by", ["prepare", "Trainer", "no one"])
def test_nothing_is_computed_again_below_the_lowest_new_layer(deeper, tmp_path, enabled_by):
    """Also where the Trainer enables gradient checkpointing, and with it gradients of the embeddings' outputs."""
    model = training.prepare(deeper, checkpointing=enabled_by == "prepare").model
    count = computed_layers(model)
    args = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=1, save_strategy="no", report_to="none",
        gradient_checkpointing=enabled_by == "Trainer", bf16=enabled_by == "Trainer", use_cpu=True,
        learning_rate=1e-2,
    )  # fmt: skip
    rows = [{"input_ids": IDS[0], "labels": IDS[0]}] * 2
    made = transformers.Trainer(model=model, args=args, train_dataset=rows)
    training.watch(made, deeper)
    made.train()
    again = 1 if enabled_by == "no one" else 2
    assert count == {0: 1, 1: 1, **dict.fromkeys(range(2, 6), again)}
    assert all(p.any() for n, p in model.named_parameters() if n in training.new_parameters(deeper))
    assert model(input_ids=IDS).logits.isfinite().all()


def test_checkpoints_with_reentry_keep_their_gradients(deeper):
    """There the first layer's input must require a gradient, or none passes."""
    model = training.prepare(deeper, checkpointing=False).model
    model.gradient_checkpointing_enable({"use_reentrant": True})
    training.checkpointing.spare_frozen(model)
    assert len(model._require_grads_hooks) > 0
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_a_base_that_is_quantised_on_loading(twelve, tmp_path, run, bits):
    prepared = training.prepare(twelve, base=bits)
    model, new = prepared.model, set(training.new_parameters(twelve))
    codes = {name for name, p in model.named_parameters() if training.quantized.is_codes(p)}
    assert codes == {n for n in weights(twelve) if n.endswith("_proj.weight") and n not in new}  # no head: it is tied
    assert {p.dtype for n, p in model.named_parameters() if n in new} == {torch.float32}
    assert {p.dtype for n, p in model.named_parameters() if n not in new | codes} == {torch.bfloat16}
    losses = steps(model, twelve)
    assert losses[-1] < losses[0] - 0.1
    made = trainer(model, tmp_path / "runs")
    training.watch(made, twelve, check_every=1)
    made.train()
    training.save_trained(model, twelve, tmp_path / "saved")
    assert changed(weights(twelve), weights(tmp_path / "saved")) == new
    assert run("verify", tmp_path / "saved", "--json").json()["passed"]


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "gemma2"])
def test_names_and_heads_of_other_families_in_4_bits(tmp_path, family):
    out = grow(tiny_models.make(tmp_path / "base", family), tmp_path / "out", "copy_next", {"after": [0]})
    prepared = training.prepare(out, base="4bit")
    assert prepared.trainable.quantized_tensors > 6 and prepared.trainable.layers == (1,)
    assert not training.quantized.is_codes(prepared.model.get_output_embeddings().weight)
    assert prepared.trainable.normed is (family == "gemma2")
    before = {n: p.detach().clone() for n, p in prepared.model.named_parameters()}
    steps(prepared.model, out)
    trained = changed(before, dict(prepared.model.named_parameters()))
    assert trained == {n for n, p in prepared.model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("name", ["bnb_nf4", "fp8_block_moe", "ct_int4_group"])
def test_a_base_that_is_stored_quantised(quantized, tmp_path, run, name):  # noqa: F811
    out = grow(quantized(name), tmp_path / "out", insert={"after": [1]})
    prepared = training.prepare(out)
    assert prepared.base == {"b": "bitsandbytes", "f": "fp8", "c": "compressed-tensors"}[name[0]]
    assert bool(prepared.trainable.quantized_tensors) is (name == "bnb_nf4")
    assert {p.dtype for p in prepared.model.parameters() if p.requires_grad} == {torch.float32}
    losses = steps(prepared.model, out)
    assert losses[-1] < losses[0]
    training.save_trained(prepared.model, out, tmp_path / "saved")
    before, after = (load_file(folder / "model.safetensors") for folder in (out, tmp_path / "saved"))
    assert {n for n in changed(before, after) if ".layers.2." not in n} == set()
    for wanted in ({"base": "4bit"}, {"all_layers": True}):
        with pytest.raises(TrainingError, match="stored quantised"):
            training.prepare(out, **wanted)


def test_all_layers(twelve, tmp_path, run):
    """Saved under the names and in the dtype that they are stored in; verify and strip know that the base changed."""
    first = training.prepare(twelve)
    steps(first.model, twelve)
    training.save_trained(first.model, twelve, tmp_path / "first")
    prepared = training.prepare(tmp_path / "first", all_layers=True)
    assert prepared.trainable.frozen_tensors == 0 and prepared.trainable.layers == tuple(range(14))
    assert {p.dtype for p in prepared.model.parameters()} == {torch.float32} and prepared.autocast
    losses = steps(prepared.model, tmp_path / "first")
    assert losses[-1] < losses[0]
    with pytest.raises(TrainingError, match="a weight of the base trains"):
        training.save_trained(prepared.model, tmp_path / "first", tmp_path / "saved")
    training.save_trained(prepared.model, tmp_path / "first", tmp_path / "saved", all_layers=True)
    before, after = weights(tmp_path / "first"), weights(tmp_path / "saved")
    assert changed(before, after) == set(before) and {t.dtype for t in after.values()} == {torch.bfloat16}
    found = load(tmp_path / "saved").state_dict()
    assert all(torch.equal(found[n], p.detach().bfloat16().float()) for n, p in prepared.model.named_parameters())
    report = run("verify", tmp_path / "saved", "--json").json()
    copied = next(check for check in report["checks"] if check["name"] == "copied tensors")
    assert report["passed"] and copied["passed"] is None and "the base was trained" in copied["detail"]
    stripped = run("strip", tmp_path / "saved", tmp_path / "base", "--json").json()
    assert len(stripped["different"]) == len(weights(tmp_path / "base")) and stripped["equal_to_base"] == 0
    assert run("inspect", tmp_path / "saved", "--json").json()["grown"] == "1, 12 (trained)"
    model = training.prepare(tmp_path / "saved").model  # and its new layers alone, once more: it stays known
    training.save_trained(model, tmp_path / "saved", tmp_path / "again")
    assert run("verify", tmp_path / "again", "--json").json()["passed"]


# fmt: off
REFUSED = {  # family, settings, and the message with its hint
    "unknown base": ("llama", {"base": "16bit"}, "unknown base.*bfloat16"),
    "experts": ("mixtral", {"base": "4bit"}, "experts of this model are none.*bfloat16"),
    "nothing to quantise": ("falcon", {"base": "4bit"}, "quantises nothing"),
    "quantised, all layers": ("llama", {"base": "8bit", "all_layers": True}, "quantised weights do not train"),
    "one dtype only": ("hy_v4", {}, "does not compute with its base in bfloat16.*base='float32'"),
    "weights that are read as they are": ("mamba", {"base": "4bit"}, "does not compute with its base in 4bit"),
}
# fmt: on


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case, tmp_path):
    family, settings, message = REFUSED[case]
    out = grow(tiny_models.make(tmp_path / "base", family), tmp_path / "out", "copy_next", {"count": 1, "where": "top"})
    with pytest.raises(TrainingError, match=f"(?s){message}"):
        training.prepare(out, **settings)


def test_what_cannot_be_prepared(deeper, monkeypatch):
    with pytest.raises(TrainingError, match="not a folder"):
        training.prepare(deeper / "deus_merge.json")
    monkeypatch.setattr(transformers.LlamaForCausalLM, "supports_gradient_checkpointing", False)
    with pytest.raises(TrainingError, match="(?s)no gradient checkpointing.*checkpointing=False"):
        training.prepare(deeper)
    assert training.prepare(deeper, checkpointing=False).autocast
