"""New layers over quantised weights, as transformers loads them on a CPU: training, saving, and growing on."""

from __future__ import annotations

import json
from math import prod

import pytest
import torch
import transformers
from grown import IDS, changed, grow, trainer
from quantized_checkpoints import VARIANTS, float_model, quantized  # noqa: F401
from safetensors.torch import load_file
from support import make_model
from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer

from deus_merge import training
from deus_merge.checkpoint import LoadOptions, open_source
from deus_merge.core.errors import TrainingError
from deus_merge.training.quantized import DEQUANTIZING

#: stay quantised in memory
CODES = ["bnb_nf4", "bnb_fp4", "bnb_int8"]
#: are dequantised by transformers; of some the codes have other names than the weights, or experts are one parameter
FLOATS = ["fp8_block", "fp8_block_moe", "fp8_tensor", "ct_int4_group", "ct_fp8_kv", "mxfp4"]


@pytest.fixture(scope="module")
def deeper(quantized, tmp_path_factory):  # noqa: F811
    """A grown folder by variant, whose layer 2 is new. Not to be changed."""
    made = {}

    def folder(name):
        if name not in made:
            made[name] = grow(quantized(name), tmp_path_factory.mktemp(name) / "deeper", insert={"after": [1]})
        return made[name]

    return folder


def load(folder, **options):
    method = json.loads((folder / "config.json").read_text()).get("quantization_config", {}).get("quant_method")
    if method in DEQUANTIZING and not options:
        options = {"quantization_config": getattr(transformers, DEQUANTIZING[method])(dequantize=True)}
    return transformers.AutoModelForCausalLM.from_pretrained(folder, device_map="cpu", **options)


def weights(folder):
    return load_file(folder / "model.safetensors")


def train(model, folder, steps: int = 3) -> list[float]:
    """Losses of a plain loop that also evaluates; the last after the last step."""
    optimizer = torch.optim.AdamW(training.optimizer_groups(model, folder, lr=1e-2))
    losses = []
    for _ in range(steps):
        model.train()(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            losses.append(model.eval()(input_ids=IDS, labels=IDS).loss.item())
    return losses


@torch.no_grad()
def logits(model):
    """In training mode: in the other, bitsandbytes rounds scales on some CPUs."""
    return model.train()(input_ids=IDS).logits.float()


@pytest.mark.parametrize("name", [*CODES, *FLOATS])
def test_the_whole_way(name, deeper, quantized, run, tmp_path):  # noqa: F811
    """Only the new layer trains; the base is saved byte for byte, and can be stripped, and grown on."""
    out, saved = deeper(name), tmp_path / "saved"
    model = load(out)
    done = training.freeze_base(model, out, dtype=torch.float32)
    assert (done.layers, done.dtype) == ((2,), "float32") and "small steps" not in str(done)
    assert bool(done.quantized_tensors) is (name in CODES) is ("quantised" in str(done))
    whole = open_source(str(quantized(name)), LoadOptions()).tensors  # by names in floating point
    assert done.frozen_parameters == sum(prod(t.shape) for key, t in whole.items() if not key.endswith("_scale"))
    watch = training.Watch(model, out)
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    losses = train(model, out)
    assert losses[-1] < 0.7 * losses[0]
    assert watch.check() == done.frozen_tensors and watch.norms()["new_layers/zeroed_norm"] > 0
    trained = {key for key, p in model.named_parameters() if p.requires_grad}
    assert changed(before, dict(model.named_parameters())) == trained
    assert trained == {key for key in before if ".layers.2." in key}

    names = training.save_trained(model, out, saved)
    new = {key for key in weights(out) if ".layers.2." in key and not key.endswith("_scale")}  # but those of caches
    assert set(names) == new == changed(weights(out), weights(saved))
    assert run("verify", saved, "--json").json()["passed"]
    training.quantized.cast(model.parameters(), torch.bfloat16)  # as it was loaded, but for the new layer
    assert torch.equal(logits(load(saved)), logits(model))
    stripped = run("strip", saved, tmp_path / "base", "--json").json()
    assert (stripped["equal_to_base"], stripped["different"]) == (len(weights(quantized(name))), [])
    again = grow(saved, tmp_path / "again", insert={"after": [0, 2]})
    assert training.freeze_base(load(again), again).layers == (1, 4)
    assert run("inspect", again, "--json").json()["grown"] == "3 (trained); then 1, 4"

    scope: dict = {}
    exec(run("export-training", saved).out, scope)
    assert {key for key, p in scope["model"].named_parameters() if p.requires_grad} == trained
    refused = run("export-training", saved, "--for", "axolotl", expect=2).err
    assert "trains no layers of a quantised model" in refused and "--for trainer" in refused


@pytest.mark.parametrize("name", [*CODES, "fp8_block", "fp8_block_moe", "ct_fp8_kv", "mxfp4"])
def test_saved_by_the_trainer(name, deeper, run, tmp_path):
    """transformers' Trainer takes the model, and its checkpoints are models: codes stay codes, what was dequantised is
    in floating point, which verify and strip say."""
    out, checkpoint = deeper(name), tmp_path / "runs/checkpoint-4"
    model = load(out)
    if name in CODES:
        with pytest.raises(ValueError, match="purely quantized"):
            trainer(model, tmp_path / "runs")
    print(training.freeze_base(model, out))
    made = trainer(model, tmp_path / "runs")
    training.watch(made, out, check_every=1)
    made.train()
    assert made.state.log_history[-2]["loss"] < made.state.log_history[0]["loss"]
    checks = run("verify", checkpoint, "--json").json()
    copied = {check["name"]: check for check in checks["checks"]}["copied tensors"]
    assert checks["passed"] and copied["passed"] is (True if name in CODES else None)
    assert ("quantised weights were saved in floating point" in copied["detail"]) is (name not in CODES)
    done = run("strip", checkpoint, tmp_path / "base", "--json").json()
    assert bool(done["different"]) is bool(done["dequantized"]) is (name not in CODES)
    assert torch.equal(logits(load(checkpoint)), logits(model))
    back = load(tmp_path / "base")
    assert back.config.num_hidden_layers == 3 and logits(back).isfinite().all()
    section = json.loads((tmp_path / "base/config.json").read_text()).get("quantization_config")
    assert bool(section) is (name in CODES)
    grown = grow(checkpoint, tmp_path / "again", insert={"after": [0]})
    assert run("verify", grown, "--json").json()["passed"]


@pytest.mark.parametrize("name", CODES)
def test_codes_and_scales_are_watched(name, deeper):
    """Scales are no parameters of bitsandbytes' modules."""
    out = deeper(name)
    for part in ("codes", "scales"):
        model = load(out)
        training.freeze_base(model, out)
        watch = training.Watch(model, out)
        weight = model.model.layers[3].mlp.up_proj.weight
        if part == "codes":
            weight.data[0, 0] ^= 1
        elif name == "bnb_int8":
            weight.SCB[0] *= 2
        else:
            weight.quant_state.absmax[0] += 1
        with pytest.raises(TrainingError, match="frozen weight has changed") as caught:
            watch.check()
        assert caught.value.where == "model.layers.3.mlp.up_proj.weight"


def test_weights_that_no_gradient_passes(deeper, monkeypatch):
    """Codes that kernels without a gradient compute with: as on a GPU for FP8, and on any device for others."""
    out = deeper("ct_int4_group")
    with pytest.raises(TrainingError, match="gradients do not pass") as caught:
        training.freeze_base(load(out, dtype="auto"), out)
    assert "transformers.CompressedTensorsConfig(dequantize=True)" in str(caught.value)
    monkeypatch.setattr(FineGrainedFP8HfQuantizer, "validate_environment", lambda *_, **__: None)
    for name in ("fp8_block", "fp8_block_moe"):
        model = load(deeper(name), dtype="auto")
        assert any(p.dtype == torch.float8_e4m3fn for p in model.parameters())
        for act in (training.freeze_base, training.Watch):
            with pytest.raises(TrainingError, match="gradients do not pass"):
                act(model, deeper(name))
    model = load(deeper("bnb_nf4"))
    state = model.model.layers[3].mlp.up_proj.weight.quant_state
    state.packing_format_for_cpu = True  # as bitsandbytes leaves it after an evaluation on some CPUs
    with pytest.raises(TrainingError, match="in.o another order") as caught:
        training.freeze_base(model, deeper("bnb_nf4"))
    assert "before its first forward pass" in str(caught.value)


def test_new_layers_that_are_quantised(quantized, run, tmp_path):  # noqa: F811
    """They do not train as codes; dequantised, they do, but are not saved as codes."""
    for name in ("bnb_int8", "fp8_block"):
        out = tmp_path / name
        run("upscale", quantized(name), out, "--quantize-new", "--insert", "{after: [1]}", "--no-verify")
        model = load(out)
        if name == "bnb_int8":
            with pytest.raises(TrainingError, match="cannot be trained") as caught:
                training.freeze_base(model, out)
            assert "without quantize_new" in str(caught.value)
            continue
        training.freeze_base(model, out)
        with pytest.raises(TrainingError, match="is stored quantised") as caught:
            training.save_trained(model, out, tmp_path / "saved")
        assert "save_pretrained" in str(caught.value) and not (tmp_path / "saved").exists()


def test_quantised_on_loading(tmp_path):
    """A grown model in floating point, of which only the base is quantised in memory: its own values are saved. Codes
    that are stored as floats stay as they are."""
    out = grow(make_model(tmp_path / "base", dtype=torch.bfloat16), tmp_path / "deeper", insert={"after": [1]})
    for skipped in (["lm_head"], ["lm_head", "model.layers.2"]):
        settings = transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_storage=torch.bfloat16, llm_int8_skip_modules=skipped
        )
        model = load(out, quantization_config=settings)
        if skipped == ["lm_head"]:
            with pytest.raises(TrainingError, match="cannot be trained") as caught:
                training.freeze_base(model, out)
            assert "llm_int8_skip_modules" in str(caught.value)
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    done = training.freeze_base(model, out, dtype=torch.float32)
    assert (done.quantized_tensors, done.dtype) == (28, "float32")
    codes = {key: p for key, p in before.items() if "_proj" in key and ".layers.2." not in key}
    assert len(codes) == 28 and not changed(codes, dict(model.named_parameters()))
    trainer(model, tmp_path / "runs").train()
    training.save_trained(model, out, tmp_path / "saved")
    new = {key for key in weights(out) if ".layers.2." in key}
    assert changed(weights(out), weights(tmp_path / "saved")) == new


def test_adapters_over_codes(deeper, run, tmp_path):
    """peft saves its adapter with the new layers; with the deeper model it is the trained one."""
    peft = pytest.importorskip("peft")
    out = deeper("bnb_nf4")
    adapted = r".*layers\.[013]\.self_attn\.q_proj"
    model = peft.get_peft_model(load(out), peft.LoraConfig(target_modules=adapted, modules_to_save=["layers.2"]))
    done = training.freeze_base(model, out, dtype=torch.float32)
    assert (done.trained_tensors, done.added_tensors, done.unsaved, done.quantized_tensors) == (9, 6, (), 21)
    made = trainer(model, tmp_path / "runs")
    training.watch(made, out)
    made.train()
    with pytest.raises(TrainingError, match="adapters, which would be lost"):
        training.save_trained(model, out, tmp_path / "saved")
    recipe = tmp_path / "whole.yml"
    recipe.write_text(f"merge_method: passthrough\nmodels: [{{model: {out}+{tmp_path / 'runs/checkpoint-4'}}}]\n")
    run("merge", recipe, tmp_path / "whole")
    whole = load(tmp_path / "whole")
    kinds = {key: p.dtype for key, p in whole.named_parameters() if key.endswith("_proj.weight")}
    assert kinds["model.layers.0.self_attn.q_proj.weight"] == torch.bfloat16  # in every layer: no codes are left of it
    assert kinds["model.layers.0.self_attn.k_proj.weight"] == torch.uint8
    assert torch.cosine_similarity(logits(whole).flatten(), logits(model).flatten(), dim=0) > 0.999


def test_what_is_not_saved(deeper, tmp_path):
    out = deeper("bnb_int8")
    model = load(out).requires_grad_(False)
    with pytest.raises(TrainingError, match="no weight of this model trains"):
        training.save_trained(model, out, tmp_path / "saved")
    training.freeze_base(model, out)
    model.model.norm.weight.requires_grad_(True)
    with pytest.raises(TrainingError, match="a weight of the base trains") as caught:
        training.save_trained(model, out, tmp_path / "saved")
    assert caught.value.where == "model.norm.weight" and not list(tmp_path.iterdir())


def test_codes_of_other_names_in_memory(quantized, tmp_path):  # noqa: F811
    """GPTQ's modules have no parameter ``weight``; a model that lacks one of them is another one."""
    out = grow(quantized("gptq"), tmp_path / "deeper", insert={"after": [1]})
    config = json.loads((out / "config.json").read_text())
    del config["quantization_config"]
    model = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**config))
    tensors = weights(out)
    for key in [key for key in tensors if key.endswith(".qweight")]:
        parent, _, last = key.removesuffix(".qweight").rpartition(".")
        module = torch.nn.Module()
        for part in ("qweight", "qzeros", "scales", "g_idx"):
            module.register_buffer(part, tensors[f"{parent}.{last}.{part}"])
        module.qweight = torch.nn.Parameter(module._buffers.pop("qweight"), requires_grad=False)
        setattr(model.get_submodule(parent), last, module)
    done = training.freeze_base(model, out)
    assert (done.layers, done.quantized_tensors) == ((2,), 21)
    assert training.Watch(model, out).check() == done.frozen_tensors
    model.model.layers[3].mlp.up_proj = torch.nn.Module()
    with pytest.raises(TrainingError, match="1 missing, first model.layers.3.mlp.up_proj.weight"):
        training.freeze_base(model, out)


def test_the_variants_are_there():
    assert set(CODES) | set(FLOATS) <= set(VARIANTS)
