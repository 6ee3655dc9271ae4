"""The estimate of training memory: by hand for one shape, against autograd for real layers; and what fits on a card."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
import torch
import transformers
from support import make_model
from tiny_models import shared

from deus_merge import api, training
from deus_merge.core.errors import PlanError, TrainingError
from deus_merge.models.families._pieces import llama_layer
from deus_merge.models.spec import Heads
from deus_merge.plan.activations import LayerShape, Weight
from deus_merge.plan.fit import check, choose, within
from deus_merge.plan.training_memory import OVERHEAD, ModelShape, TrainingSettings, training_memory
from deus_merge.recipe.presets import evenly

GB = 10**9
SIZES = {
    "n1": (8,), "q": (8, 8), "k": (4, 8), "v": (4, 8), "o": (8, 8),
    "n2": (8,), "gate": (12, 8), "up": (12, 8), "down": (8, 12),
}  # fmt: skip
SPECS = {spec.role: spec for (sublayer,) in llama_layer() for spec in sublayer.tensors}


def layer(new: bool, quantized: int = 0, scale: int = 1) -> LayerShape:
    """A Llama layer of 496 elements, 480 of them in matrices; of ``quantized`` bytes each, where that is not 0."""
    weights = []
    for role, shape in SIZES.items():
        scaled = tuple(scale * n for n in shape)
        codes = bool(quantized) and len(shape) == 2
        weights.append(Weight(role, scaled, quantized if codes else 0, codes, SPECS[role]))
    return LayerShape(new, tuple(weights), Heads(4 * scale, 2 * scale, 2))


OUTSIDE = (Weight("embed", (100, 8), 0), Weight("norm", (8,), 0))
SHAPE = ModelShape((layer(False), layer(True), layer(False), layer(True)), OUTSIDE, hidden=8, vocabulary=100)


def test_terms_by_hand():
    """Two new layers of four, 2 x 16 tokens. A frozen layer keeps 200 bytes per token: norms 64, q k v 32, attention
    16 + 16, gate and up 48, the activation 24; a trained one 136 more: norms 32, inputs 48 + 32, the product 24."""
    found = training_memory(SHAPE, TrainingSettings(2, 16))
    assert found is not None
    terms = {name: value for name, value in found.describe().items() if name != "settings"}
    assert terms == {
        "base_weights": 2 * (808 + 2 * 496), "new_weights": 4 * 992, "gradients": 4 * 992, "optimizer_states": 8 * 992,
        "copies": 2 * 2 * 480, "activations": 32 * (336 + 200 + 336), "loss": 12 * 32 * 100, "overhead": OVERHEAD,
        "peak": OVERHEAD + 3600 + 3968 + 7936 + 1920 + 27904 + 38400, "phase": "loss",
    }  # fmt: skip
    assert (SHAPE.parameters, SHAPE.new_parameters) == (808 + 4 * 496, 992)


def peak(shape: ModelShape = SHAPE, **settings) -> tuple[int, str]:
    found = training_memory(shape, TrainingSettings(**{"batch": 2, "length": 16, **settings}))
    assert found is not None
    return found.peak - OVERHEAD, found.phase


def test_phases_by_hand():
    stored, gradients = 3600 + 3968, 3968
    # with checkpointing: the input of each of four layers, that of the last norm in float32; no copies any more
    assert peak(checkpointing=True) == (stored + 7936 + 32 * 8 * (4 * 2 + 4) + 38400, "loss")
    assert peak(accumulate=True) == (stored + 7936 + gradients + 1920 + 27904 + 38400, "loss")
    # one token: AdamW's step, with a float32 number for each element
    assert peak(batch=1, length=1) == (stored + 7936 + gradients + 4 * 992, "step")
    # the backward pass of the lowest new layer: what it keeps, its copies, all gradients, and its widest output twice
    assert peak(batch=1, length=1, optimizer="sgd") == (stored + gradients + 336 + 960 + 4 * 12, "backward")
    # the same, computed anew, beside what two layers and the last norm keep
    again = 8 * (2 * 2 + 4) + 336 + 960 + 4 * 12
    assert peak(batch=1, length=1, optimizer="sgd", checkpointing=True) == (stored + gradients + again, "backward")


def test_states_and_bases_by_hand():
    states = {"adamw": 8 * 992, "adamw_8bit": 2 * 960 + 960 / 32 + 8 * 32, "muon": 4 * 960 + 8 * 32, "sgd": 0}
    assert {name: estimate(optimizer=name).optimizer_states for name in states} == states
    others = 2 * (808 + 32)  # embeddings and norms
    bases = {"bfloat16": 2 * 960, "8bit": 960, "4bit": 0.5625 * 960, "float32": 4 * 960 + others}
    assert {name: estimate(base=name).base_weights - others for name in bases} == bases
    codes = replace(SHAPE, layers=(layer(False, 30), layer(True), layer(False, 30), layer(True)))
    assert estimate(codes).base_weights == others + 14 * 30
    assert estimate(codes, base="float32").base_weights == 4 * 1800
    assert training_memory(replace(SHAPE, layers=(layer(False), layer(True, 30))), TrainingSettings()) is None
    assert training_memory(replace(SHAPE, layers=(layer(False),)), TrainingSettings()) is None


def estimate(shape: ModelShape = SHAPE, **settings):
    found = training_memory(shape, TrainingSettings(**settings))
    assert found is not None
    return found


REAL = {
    "qwen3": ("Qwen3Config", {"head_dim": 64}),
    "experts": ("Qwen3MoeConfig", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 96,
                                   "head_dim": 32}),
    "softcaps": ("Gemma2Config", {"head_dim": 32}),
    "packed": ("GPTNeoXConfig", {"num_key_value_heads": 4}),
}  # fmt: skip


@pytest.mark.parametrize("name", REAL)
def test_what_autograd_keeps(tmp_path, name):
    """Every tensor that autograd keeps in a forward pass, against activations, copies, and what the loss keeps."""
    kind, more = REAL[name]
    sizes = {"hidden_size": 128, "intermediate_size": 320, "num_hidden_layers": 4, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 64, "tie_word_embeddings": True}  # fmt: skip
    config = getattr(transformers, kind)(**{**sizes, **more})
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path / "base")
    plan = api.plan(api.upscale_recipe(tmp_path / "base", preset="llama_pro", insert={"after": [0, 2]}))
    api.merge(plan, tmp_path / "out", api.RunOptions(verify=False))
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    training.freeze_base(model, tmp_path / "out")
    for parameter in model.parameters():
        parameter.data = parameter.data.float() if parameter.requires_grad else parameter.data
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    tokens = torch.arange(192).reshape(2, 96) % 64  # (B, L)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model.train()(input_ids=tokens, labels=tokens, use_cache=False).loss
    measured = sum(storage.nbytes() for storage in kept.values())
    assert loss.requires_grad
    found = plan.training_memory(TrainingSettings(2, 96))
    assert found is not None
    logits = 192 * 64 * (4 + 2 * plan.shape.capped)
    assert found.activations + found.copies + logits == pytest.approx(measured, rel=0.04)


MANY = replace(SHAPE, layers=tuple(layer(new, scale=200) for _ in range(6) for new in (False, True)), hidden=1600)


def top_of(insert):
    """Places at the top alone."""
    return within(MANY)(insert) if insert["where"] == "top" else None


@pytest.mark.parametrize("where", ["even", "top"])
def test_a_larger_card_gets_no_fewer_layers(where):
    """The choice fits, one more layer would not, and the choice grows with the card up to all that may be put in."""
    settings, counts, shape_of = TrainingSettings(2, 512), [], within(MANY) if where == "even" else top_of
    places = [evenly(range(6), n) if where == "even" else range(6 - n, 6) for n in range(1, 7)]
    sizes = [estimate(MANY.with_gaps(gaps), **vars(settings)).peak for gaps in places]
    for memory in range(sizes[0], sizes[-1] + GB, GB // 16):
        found = choose(shape_of, memory, settings, 6)
        assert found.needed.peak <= memory and found.insert == {"count": found.layers, "where": where}
        assert found.needed.peak == sizes[found.layers - 1]
        assert found.layers == 6 or sizes[found.layers] > memory
        counts.append(found.layers)
    assert counts == sorted(counts) and {1, 2, 5, 6} <= set(counts)
    assert choose(shape_of, sizes[5], settings, 2).layers == 2  # no more than were asked for


def test_several_layers_in_a_gap():
    """They are kept or left out together."""
    twice = replace(MANY, layers=tuple(x for y in MANY.layers for x in ((y, y) if y.new else (y,))))
    assert twice.filled_gaps == tuple(range(6)) and len(twice.with_gaps([1, 4]).new_layers) == 4
    found = choose(within(twice), 1 << 60, TrainingSettings(2, 512), 3)
    assert found.layers == found.most == 6 and found.insert == {"count": 3, "where": "even"}


def test_the_top_where_the_middle_does_not_fit():
    settings = TrainingSettings(8, 1024)
    top, middle = (estimate(MANY.with_gaps([gap]), **vars(settings)).peak for gap in (5, 3))
    assert top < middle
    assert choose(within(MANY), middle - 1, settings, 6).insert == {"count": 1, "where": "top"}
    assert choose(within(MANY), middle, settings, 6).insert == {"count": 1, "where": "even"}


def test_more_layers_may_take_less():
    """Of a model of unlike layers: two new layers stand at other places than three."""
    settings, sizes = TrainingSettings(2, 512), {1: 1, 2: 3, 3: 2}
    shapes = {count: MANY.with_gaps(range(6 - size, 6)) for count, size in sizes.items()}
    memory = estimate(shapes[3], **vars(settings)).peak
    assert choose(lambda insert: shapes[insert["count"]], memory, settings, 3).insert["count"] == 3


def test_no_place():
    with pytest.raises(PlanError, match="no place for a new layer"):
        choose(lambda insert: None, 1 << 60, TrainingSettings(2, 512), 3)


FITTING = {
    "one": (MANY.with_gaps([5]), lambda memory, how: choose(within(MANY), memory, how, 6)),
    "all": (MANY, lambda memory, how: check(MANY, memory, how, "all")),
}


@pytest.mark.parametrize("layers", FITTING)
@pytest.mark.parametrize("share", [0.9, 0.7, 0.5, 0.45, 0.32])
def test_a_refusal_says_what_would_fit(layers, share):
    """Its advice, followed, fits; of several options together none can be left out."""
    settings, (shape, fit) = TrainingSettings(8, 1024), FITTING[layers]
    memory = OVERHEAD + round(share * (estimate(shape, **vars(settings)).peak - OVERHEAD))
    with pytest.raises(PlanError) as caught:
        fit(memory, settings)
    hint, _, more = str(caught.value.hint).partition(";")
    assert hint.startswith("it fits with ") and bool(more) is (layers == "all")
    for options in hint.removeprefix("it fits with ").split(" or "):
        words = re.sub(r" together| \([^)]*\)", "", options).replace("--base-dtype", "--base").split("--")[1:]
        changes = [setting(*word.split()) for word in words]
        assert fit(memory, replace(settings, **dict(changes))).needed.peak <= memory, options
        for left_out in changes:
            with pytest.raises(PlanError):
                fit(memory, replace(settings, **dict(c for c in changes if c != left_out)))


def test_a_refusal_without_advice():
    with pytest.raises(PlanError, match="even with .*--batch 1 .*only more memory or a smaller base helps"):
        choose(within(MANY), OVERHEAD, TrainingSettings(8, 1024), 6)


def setting(name: str, value: str = "") -> tuple[str, object]:
    return name, int(value) if value.isdigit() else value or True


def test_upscale_fits(run, tmp_path):
    """The plan of the chosen layers takes what the choice said; the output, inspected, takes the same."""
    base = make_model(tmp_path / "base", layers=8)
    how = ("--batch", 4, "--length", 256, "--optimizer", "muon", "--checkpointing")
    arguments = ("upscale", base, tmp_path / "out", *how, "--json")
    most = run(*arguments, "--fit", "24GB", "--dry-run").json()
    assert most["fit"] == {"memory": 24 * GB, "insert": {"count": 4, "where": "even"}, "layers": 4, "most": 4}
    assert most["new_layers"] == [1, 4, 7, 10] and not (tmp_path / "out").exists()
    less = run(*arguments, "--fit", most["training_memory"]["peak"] - 1, "--dry-run").json()
    assert less["fit"]["layers"] == len(less["new_layers"]) == 3
    assert less["training_memory"]["peak"] < most["training_memory"]["peak"]
    settings = TrainingSettings(4, 256, "muon", checkpointing=True)
    assert less["training_memory"]["settings"] == json.loads(json.dumps(settings.__dict__))
    run(*arguments, "--fit", less["fit"]["memory"], "--no-verify")
    inspected = run("inspect", tmp_path / "out", *how, "--json").json()
    assert inspected["training_memory"] == less["training_memory"]
    assert [inspected[n] for n in ("parameters", "new_parameters")] == [
        less[n] for n in ("parameters", "new_parameters")
    ]
    assert "training memory" in run("inspect", tmp_path / "out").out
    assert "new_parameters" not in run("inspect", base, "--json").json()
    arguments = ("upscale", base, tmp_path / "other", *how, "--json")
    said = run(*arguments, "--fit", "24GB", "--insert", "{every: 2}", "--dry-run").json()
    assert said["fit"]["layers"] == 3 and said["new_layers"] == [2, 5, 8]
    text = run(*arguments[:-1], "--fit", "24GB", "--dry-run").out
    assert "4 new layers of at most 4 fit into 24.00 GB" in text and "training the new layers: about 1.0" in text


@pytest.mark.parametrize("kind", ["rwkv", "hy_v4", "glm_moe_dsa"])
def test_what_fits_can_be_planned_where_not_every_gap_can_have_a_layer(kind):
    """The first layer of RWKV is unlike all others, for example."""
    found = api.fit(shared(kind), "24GB", preset="llama_pro")
    plan = api.plan(api.upscale_recipe(shared(kind), preset="llama_pro", insert=found.insert))
    assert len(plan.new_layers) == found.layers <= found.most
    with pytest.raises(PlanError):
        api.plan(api.upscale_recipe(shared(kind), preset="llama_pro", insert="all"))


def test_what_cannot_be_fitted(run, tmp_path, tiny):
    for options, words in {
        ("--preset", "solar"): "repeats layers",
        ("--insert", "all", "--batch", "512"): "does not fit",
        ("--batch", "512"): "training one new layer does not fit",
    }.items():
        assert words in run("upscale", tiny, tmp_path / "out", "--fit", "2GB", *options, expect=2).err
    assert not (tmp_path / "out").exists()
    for wrong in ({"batch": 0}, {"optimizer": "adam"}, {"base": "int8"}):
        with pytest.raises(TrainingError):
            TrainingSettings(**wrong)
