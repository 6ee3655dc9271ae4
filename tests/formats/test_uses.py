"""Quantised sources in everything else that recipes can do, and what is refused or reported."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from quantized_checkpoints import VARIANTS
from safetensors.torch import load_file, save_file
from support import make_speakers
from test_every_format import config_of, format_of, logits, passthrough, recipe, source, stored

from deus_merge import api
from deus_merge.checkpoint.quantized import quantization

HALF = "parameters: {weight: 0.5}\n"
BOTH = "models: [{model: 'A'}, {model: 'B'}]\n"
COMMON = ("fp8_block", "bnb_nf4", "gptq", "ct_int4_group")


@pytest.fixture
def copy(quantized, tmp_path):
    """A copy of a quantised model that a test may change: its folder, and what to do with its tensors."""

    def make(name, change=None, **section):
        folder = tmp_path / f"changed-{name}"
        shutil.copytree(quantized(name), folder)
        if change:
            tensors = load_file(folder / "model.safetensors")
            change(tensors)
            save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        config = config_of(folder)
        config["quantization_config"] |= section
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return make


@pytest.mark.parametrize("name", COMMON)
def test_alignment_documents_and_learned_layers(name, quantized, run, tmp_path):
    """What is computed from a quantised model is what is computed from its dequantised one."""
    base, second, plain = quantized(name), quantized(name, 1), {}
    for i, folder in enumerate((base, second)):
        plain[i] = tmp_path / f"plain{i}"
        run(
            "merge",
            recipe(tmp_path / "p.yml", f"merge_method: passthrough\ndtype: float32\nmodels: [{{model: '{folder}'}}]\n"),
            plain[i],
        )
    texts = {
        "align": f"merge_method: linear\n{HALF}align: symmetry\n{BOTH}",
        "slerp": f"merge_method: slerp\nbase_model: 'A'\nparameters: {{t: 0.3}}\n{BOTH}",
        "documents": f"dtype: float32\nname: half\nmerge_method: linear\n{HALF}{BOTH}---\ndtype: float32\n"
        f"merge_method: task_arithmetic\nbase_model: 'A'\n{HALF}models: [{{model: half}}]\n",
        "lesa": "base_model: 'A'\nupscale: {preset: lesa, insert: {after: [1]}}\n",
        "two": "merge_method: ot_fuse\nslices:\n  - sources:\n"
        "    - {model: 'A', layer_range: [0, 2]}\n    - {model: 'B', layer_range: [1, 3]}\n",
    }
    for title, text in texts.items():
        results = []
        for where, (a, b) in {"codes": (base, second), "plain": (plain[0], plain[1])}.items():
            out = tmp_path / f"{title}-{where}"
            written = text.replace("'A'", f"'{a}'").replace("'B'", f"'{b}'")
            dtype = "" if title in ("lesa", "documents") or where == "plain" else "dtype: float32\n"
            run(
                "merge",
                recipe(tmp_path / "r.yml", f"{dtype}{written}"),
                out,
                "--no-verify",
            )
            results.append(source(out))
        ours, theirs = results
        for key, tensor in ours.tensors.items():
            if tensor.quantization is None and tensor.dtype == theirs.tensors[key].dtype:
                assert torch.equal(ours.read(key), theirs.read(key)), (title, key)
            elif tensor.quantization is None:
                assert torch.equal(ours.read(key), theirs.read(key).to(ours.read(key).dtype)), (title, key)


def test_formats_mix(quantized, run, tmp_path):
    """Two models of other formats: merges compute with values; copies of the other one's layers are dequantised."""
    first, second = quantized("fp8_tensor"), quantized("bnb_nf4", 1)
    text = f"merge_method: linear\n{HALF}{BOTH}".replace("'A'", f"'{first}'").replace("'B'", f"'{second}'")
    run("merge", recipe(tmp_path / "r.yml", text), tmp_path / "mean")
    a, b, mean = source(first), source(second), source(tmp_path / "mean")
    weight = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(mean.read(weight).float(), ((a.read(weight) + b.read(weight)) / 2).bfloat16().float())
    done = run("merge", recipe(tmp_path / "s.yml", passthrough((first, 0, 2), (second, 1, 3))), tmp_path / "stack")
    assert "the output's config describes no such codes" in done.err
    run("verify", tmp_path / "stack")
    stack = source(tmp_path / "stack")
    assert {t.quantization.format for t in stack.tensors.values() if t.quantization} == {"fp8"}
    copied = stack.read("model.layers.3.mlp.up_proj.weight")
    assert torch.equal(copied.float(), b.read("model.layers.2.mlp.up_proj.weight").bfloat16().float())
    excepted = config_of(tmp_path / "stack")["quantization_config"]["modules_to_not_convert"]
    assert "model.layers.3.mlp.up_proj" in excepted and "model.layers.1.mlp.up_proj" not in excepted


def test_a_float16_model_beside_a_quantised_bfloat16_one(quantized, run, tmp_path):
    """Loaders do not cast what is stored beside codes, so the layers of another model need the base's dtype."""
    base, other = quantized("fp8_tensor"), quantized("gptq", 1)
    done = run("merge", recipe(tmp_path / "r.yml", passthrough((base, 0, 2), (other, 1, 3))), tmp_path / "mixed")
    assert "write the other model in bfloat16 in a document of its own" in done.err
    text = f"name: cast\ndtype: bfloat16\nmerge_method: passthrough\nmodels: [{{model: '{other}'}}]\n---\n"
    both = text + passthrough((base, 0, 2), ("cast", 1, 3))
    assert "in another dtype" not in run("merge", recipe(tmp_path / "s.yml", both), tmp_path / "out").err
    run("verify", tmp_path / "out")
    assert {t.quantization.format for t in source(tmp_path / "out").tensors.values() if t.quantization} == {"fp8"}
    assert logits(tmp_path / "out").isfinite().all()


def test_tokens_are_united(run, tmp_path):
    """Rows of tokens are taken and averaged in a merge of quantised models as in one of their values."""
    texts = {}
    for kind in ("codes", "plain"):
        names = []
        for name, folder in make_speakers(tmp_path / kind).items():
            codes = tmp_path / kind / f"{name}-fp8"
            VARIANTS["fp8_tensor"].make(folder, codes)
            for file in folder.glob("token*"):
                shutil.copy(file, codes)
            names.append(codes)
            if kind == "plain":
                text = f"merge_method: passthrough\ndtype: float32\nmodels: [{{model: '{codes}'}}]\n"
                names[-1] = tmp_path / kind / f"{name}-plain"
                run("merge", recipe(tmp_path / "p.yml", text), names[-1])
        models = ", ".join(f"{{model: '{name}'}}" for name in names)
        texts[kind] = f"dtype: float32\nmerge_method: linear\n{HALF}tokenizer_source: union\nmodels: [{models}]\n"
        run("merge", recipe(tmp_path / "r.yml", texts[kind]), tmp_path / f"out-{kind}")
    codes, plain = (load_file(tmp_path / f"out-{kind}" / "model.safetensors") for kind in ("codes", "plain"))
    assert codes.keys() == plain.keys()
    assert all(torch.equal(codes[key], plain[key]) for key in codes)


@pytest.mark.parametrize("name", COMMON)
def test_adapters(name, quantized, run, tmp_path):
    """An adapter is added to values: what it changes is written in floating point, all else is copied."""
    base, adapter = quantized(name), tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "lora_alpha": 2, "r": 2}))
    a, b = torch.randn(2, 192), torch.randn(192, 2)
    prefix = "base_model.model.model.layers.1.self_attn.o_proj.lora_"
    save_file({f"{prefix}A.weight": a, f"{prefix}B.weight": b}, adapter / "adapter_model.safetensors")
    out, weight = tmp_path / "out", "model.layers.1.self_attn.o_proj.weight"
    run(
        "merge",
        recipe(tmp_path / "r.yml", f"merge_method: passthrough\nmodels: [{{model: '{base}+{adapter}'}}]\n"),
        out,
    )
    run("verify", out)
    read, before = source(out), source(base)
    dtype = read.read(weight).dtype
    torch.testing.assert_close(read.read(weight), (before.read(weight) + b @ a).to(dtype), rtol=0.01, atol=0.01)
    plain = [
        key for key, tensor in read.tensors.items() if not tensor.quantization and before.tensors[key].quantization
    ]
    assert plain == [weight]
    assert "layers.1.self_attn.o_proj" in json.dumps(quantization(config_of(out))).replace("\\", "")


def test_an_adapter_to_every_weight(quantized, run, tmp_path):
    """No codes are left, and config.json says nothing of them."""
    base, adapter = quantized("fp8_tensor"), tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "lora_alpha": 1, "r": 1}))
    tensors = {}
    for key, tensor in source(base).tensors.items():
        if tensor.quantization:
            prefix = f"base_model.model.{key.removesuffix('weight')}lora_"
            tensors[f"{prefix}A.weight"], tensors[f"{prefix}B.weight"] = (
                torch.ones(1, tensor.shape[1]),
                torch.ones(tensor.shape[0], 1),
            )
    save_file(tensors, adapter / "adapter_model.safetensors")
    text = f"merge_method: passthrough\nmodels: [{{model: '{base}+{adapter}'}}]\n"
    run("merge", recipe(tmp_path / "r.yml", text), tmp_path / "out")
    run("verify", tmp_path / "out")
    assert quantization(config_of(tmp_path / "out")) is None
    assert not any(t.quantization for t in source(tmp_path / "out").tensors.values())


def test_a_changed_scale_is_found(quantized, run, tmp_path):
    for name, part in (("fp8_block", "weight_scale_inv"), ("bnb_nf4", "weight.absmax"), ("gptq", "scales")):
        out = tmp_path / name
        run("upscale", quantized(name), out, "--insert", "{after: [1]}")
        run("verify", out)
        tensors = load_file(out / "model.safetensors")
        key = f"model.layers.3.mlp.down_proj.{part}"
        tensors[key].view(torch.uint8).view(-1)[0] ^= 1
        save_file(tensors, out / "model.safetensors", {"format": "pt"})
        done = run("verify", out, expect=3)
        assert key in done.out and "differs from its source" in done.out


@pytest.mark.parametrize(("value", "said"), [(float("nan"), "holds NaN"), (float("inf"), "holds infinity")])
def test_scales_that_are_not_finite(value, said, copy, run, tmp_path):
    key = "model.layers.1.mlp.up_proj.weight_scale_inv"
    folder = copy("fp8_block", lambda tensors: tensors[key].view(-1)[:1].fill_(value))
    done = run("upscale", folder, tmp_path / "out", "--insert", "{after: [1]}", expect=2)
    assert f"{key} {said}" in done.err and not (tmp_path / "out").exists()
    run(
        "merge",
        recipe(tmp_path / "r.yml", f"merge_method: passthrough\nmodels: [{{model: '{folder}'}}]\n"),
        tmp_path / "copy",
        "--no-verify",
    )
    assert stored(tmp_path / "copy") == stored(folder)
    assert key in run("verify", tmp_path / "copy", expect=3).out


def test_scales_of_zero_are_told(copy, run, tmp_path):
    key = "model.layers.1.mlp.up_proj.weight_scale_inv"
    folder = copy("fp8_block", lambda tensors: tensors[key].view(-1)[:1].fill_(0))
    done = run("upscale", folder, tmp_path / "out", "--insert", "{after: [1]}")
    assert f"{key} holds zeros" in done.err
    run("verify", tmp_path / "out")


def test_what_is_not_known_is_refused(copy, run, tmp_path):
    def lose(part):
        return lambda tensors: tensors.pop(next(key for key in tensors if key.endswith(part)))

    for name, change, section, said in (
        ("fp8_block", lose("weight_scale_inv"), {}, "weight_scale_inv, which belongs to"),
        ("gptq", lose("qzeros"), {}, "qzeros"),
        ("bnb_nf4", lose("quant_map"), {}, "quant_map"),
        ("ct_int4_group", lose("weight_scale"), {}, "weight_scale"),
        ("awq", None, {"version": "gemv"}, "gemv"),
        ("gptq", None, {"bits": 3}, "3"),
        ("fp8_block", None, {"quant_method": "strange"}, "strange"),
    ):  # fmt: skip
        folder = copy(name, change, **section)
        done = run("upscale", folder, tmp_path / "out", expect=2)
        assert said in done.err and not (tmp_path / "out").exists(), done.err
        shutil.rmtree(folder)


def test_pickled_codes_are_read(quantized, run, tmp_path):
    """They are in no file as they are: a copy of them is dequantised, and the reason is told."""
    base, folder = quantized("gptq"), tmp_path / "base"
    folder.mkdir()
    shutil.copy(base / "config.json", folder)
    torch.save(load_file(base / "model.safetensors"), folder / "pytorch_model.bin")
    done = run("upscale", folder, tmp_path / "out", "--insert", "{after: [1]}", "--allow-pickle")
    assert "21 gptq weights of" in done.err and "written as F16: they are in pickled files" in done.err
    run("upscale", base, tmp_path / "plain", "--insert", "{after: [1]}", "--dtype", "float16")
    assert stored(tmp_path / "out") == stored(tmp_path / "plain")
    assert quantization(config_of(tmp_path / "out")) is None


def test_quantize_new_needs_a_quantised_base(quantized, float_model, run, tmp_path):
    done = run("upscale", float_model("llama"), tmp_path / "out", "--quantize-new", expect=2)
    assert "which is not quantised" in done.err
    done = run("upscale", quantized("fp8_block"), tmp_path / "out", "--quantize-new", "--dtype", "bfloat16", expect=2)
    assert "copies stay quantised" in done.err
    text = f"base_model: '{quantized('fp8_block')}'\nquantize_new: 1\nupscale: {{preset: opt_deus}}\n"
    assert "expected: true or false" in run("merge", recipe(tmp_path / "r.yml", text), tmp_path / "out", expect=2).err


def test_plan_and_inspect_say_what_is_quantised(quantized, run, tmp_path):
    base = quantized("fp8_block")
    facts = run("inspect", base, "--json").json()
    assert facts["quantized"] == {"fp8": {"weights": 21, "bits": pytest.approx(8.01, abs=0.02)}}
    assert "fp8: 21 weights at 8.0" in run("inspect", base).out
    text = f"base_model: '{base}'\nupscale: {{preset: opt_deus, insert: {{after: [0]}}}}\n"
    plan = run("plan", recipe(tmp_path / "r.yml", text), "--json").json()
    assert plan["quantized"]["fp8"]["weights"] == 21 == plan["models"][0]["quantized"]["fp8"]["weights"]
    assert "writes fp8: 21 weights" in run("plan", tmp_path / "r.yml").out
    assert format_of(base).name in run("methods", "fp8").out


def test_interrupted_and_resumed(quantized, run, tmp_path, monkeypatch):
    """A resumed run, and one with as little memory as it can use, write the same bytes."""
    from deus_merge.run.block_runner import _BlockRunner

    base, whole = quantized("fp8_block"), tmp_path / "whole"
    arguments = ("--quantize-new", "--insert", "{after: [0, 1]}", "--no-verify")
    run("upscale", base, whole, *arguments)
    run("upscale", base, tmp_path / "small", *arguments, "--max-memory", "1GB")
    ran = _BlockRunner.run

    def stops(self, block):
        if block.index == 3:
            raise KeyboardInterrupt
        return ran(self, block)

    monkeypatch.setattr(_BlockRunner, "run", stops)
    run("upscale", base, tmp_path / "resumed", *arguments, expect=130)
    monkeypatch.undo()
    run("upscale", base, tmp_path / "resumed", *arguments, "--resume")
    assert stored(whole) == stored(tmp_path / "resumed") == stored(tmp_path / "small")


@pytest.mark.parametrize("name", COMMON)
def test_training_memory_counts_codes_as_they_are_stored(name, quantized):
    """The frozen base has the bytes of its codes and their companions; all else is bfloat16."""
    folder = quantized(name)
    plan = api.plan(api.upscale_recipe(folder, preset="llama_pro", insert={"after": [0]}))
    found = plan.training_memory()
    whole = {key for key, tensor in source(folder).tensors.items() if tensor.quantization is None}
    tensors = load_file(folder / "model.safetensors").items()
    sizes = [2 * tensor.numel() if key in whole else tensor.nbytes for key, tensor in tensors]
    assert found is not None and found.base_weights == sum(sizes)
    assert found.new_weights == 4 * plan.shape.new_parameters
