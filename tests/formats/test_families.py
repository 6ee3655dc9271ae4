"""Quantised models whose modules have other names or shapes in transformers than their tensors have in the files."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import transformers
from makers import fp8, gptq
from safetensors.torch import load_file, save_file
from test_every_format import TOKENS, config_of, recipe, source, stored

SIZES: dict[str, Any] = {"vocab_size": 96, "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 3,
         "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 64}  # fmt: skip
TEXT: dict[str, Any] = SIZES | {"intermediate_size": 128, "num_key_value_heads": 2, "pad_token_id": 0}
VISION: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4,
          "image_size": 32, "patch_size": 8}  # fmt: skip


def _gemma3():
    text = transformers.Gemma3TextConfig(**TEXT, head_dim=16)
    return transformers.Gemma3Config(
        text_config=text, vision_config=transformers.SiglipVisionConfig(**VISION), mm_tokens_per_image=4,
        image_token_index=90, boi_token_index=91, eoi_token_index=92,
    )  # fmt: skip


CONFIGS = {
    "gpt2": lambda: transformers.GPT2Config(
        n_layer=3, n_embd=64, n_head=4, n_positions=64, vocab_size=96, bos_token_id=1, eos_token_id=2
    ),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**SIZES, intermediate_size=128),
    "opt": lambda: transformers.OPTConfig(**SIZES, ffn_dim=128, word_embed_proj_dim=64),
    "gemma3": _gemma3,
    "mixtral": lambda: transformers.MixtralConfig(**TEXT, num_local_experts=2),
}
SETTINGS = {"int8": {"load_in_8bit": True}, "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}}


def class_of(name):
    return transformers.Gemma3ForConditionalGeneration if name == "gemma3" else transformers.AutoModelForCausalLM


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The float model of a family, and the same one as bitsandbytes stores it."""
    folder = tmp_path_factory.mktemp("families")

    def make(name, bits=None):
        base, kind = folder / name, class_of(name)
        if not base.exists():
            torch.manual_seed(0)
            model = kind.from_config(CONFIGS[name]()) if name != "gemma3" else kind(CONFIGS[name]())
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.ndim > 1:
                        parameter.normal_(0.0, parameter.shape[-1] ** -0.5)
            model.to(torch.bfloat16).save_pretrained(base)
        if bits is None:
            return base
        if not (codes := folder / f"{name}-{bits}").exists():
            settings = transformers.BitsAndBytesConfig(**SETTINGS[bits], bnb_4bit_compute_dtype=torch.bfloat16)
            kind.from_pretrained(base, quantization_config=settings, device_map="cpu", dtype=torch.bfloat16
                                 ).save_pretrained(codes)  # fmt: skip
        return codes

    return make


@torch.no_grad()
def logits(folder, name):
    model = class_of(name).from_pretrained(folder, device_map="cpu", dtype=torch.bfloat16)
    return model.eval()(input_ids=TOKENS).logits


@pytest.mark.parametrize(
    ("name", "bits", "more"),
    [
        ("gpt2", "int8", ["--quantize-new"]),
        ("gpt2", "nf4", []),
        ("gpt_neox", "int8", []),
        ("opt", "int8", []),
        ("opt", "nf4", []),
        ("gemma3", "nf4", []),
        ("mixtral", "nf4", []),
    ],
)
def test_what_is_grown_loads_and_computes_the_same(name, bits, more, made, run, tmp_path):
    base, out, back = made(name, bits), tmp_path / "out", tmp_path / "back"
    run("upscale", base, out, "--insert", "{after: [1]}", *more)
    run("verify", out)
    assert torch.equal(logits(base, name), logits(out, name))
    run("strip", out, back)
    assert stored(back) == stored(base)


@pytest.mark.parametrize("bits", SETTINGS)
def test_values_have_the_shapes_of_the_model(bits, made, run, tmp_path):
    """Linear layers of GPT-2 are (in, out), once they are quantised (out, in)."""
    text = f"merge_method: passthrough\ndtype: float32\nmodels: [{{model: '{made('gpt2', bits)}'}}]\n"
    run("merge", recipe(tmp_path / "r.yml", text), tmp_path / "out")
    found, wanted = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", made("gpt2")))
    assert found.keys() == wanted.keys()
    for key, values in wanted.items():
        assert found[key].shape == values.shape
        alike = torch.cosine_similarity(found[key].flatten(), values.float().flatten(), dim=0)
        assert values.ndim == 1 or alike > 0.99, key
    read = source(made("gpt2", bits))
    for key in ("transformer.h.1.mlp.c_fc.weight", "transformer.h.1.attn.c_proj.weight"):
        whole = read.read(key)
        assert torch.equal(read.slice(key, 5, 12), whole[5:12]) and torch.equal(read.slice(key, 63, 64), whole[63:])


def test_a_block_of_a_transposed_weight_at_a_time(made, monkeypatch):
    key = "transformer.h.1.mlp.c_fc.weight"
    whole = source(made("gpt2", "nf4")).read(key)
    monkeypatch.setattr("deus_merge.checkpoint.dequantized._BLOCK_BYTES", 4 * 64 * 10)  # ten stored rows
    assert torch.equal(source(made("gpt2", "nf4")).read(key), whole)


def test_gptq_of_gpt2(tmp_path):
    """Layers as the model has them; the head, which is no Conv1D, as any."""
    weight, tensors = torch.randn(64, 96), {}
    for module in ("transformer.h.0.mlp.c_fc", "lm_head"):
        tensors |= {f"{module}.{part}": value for part, value in gptq.parts(weight, gptq.ACT_ORDER).items()}
    save_file(tensors, tmp_path / "model.safetensors")
    config = {"model_type": "gpt2", "dtype": "float16", "quantization_config": gptq.ACT_ORDER}
    (tmp_path / "config.json").write_text(json.dumps(config))
    read = source(tmp_path)
    assert torch.equal(read.read("transformer.h.0.mlp.c_fc.weight"), read.read("lm_head.weight").T)
    assert read.tensors["lm_head.weight"].shape == (64, 96)
    values = gptq.value(tensors, "lm_head", gptq.ACT_ORDER)
    assert torch.equal(read.read("lm_head.weight"), values)


def test_an_adapter_that_was_trained_on_codes(made, run, tmp_path):
    """It is (out, in) and says so, although the model's own weight is (in, out) and square."""
    adapter, key = tmp_path / "adapter", "transformer.h.1.attn.c_proj.weight"
    adapter.mkdir()
    settings = {"peft_type": "LORA", "lora_alpha": 2, "r": 2, "fan_in_fan_out": False}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    a, b = torch.randn(2, 64), torch.randn(64, 2)
    prefix = "base_model.model.transformer.h.1.attn.c_proj.lora_"
    save_file({f"{prefix}A.weight": a, f"{prefix}B.weight": b}, adapter / "adapter_model.safetensors")
    base = made("gpt2", "nf4")
    text = f"merge_method: passthrough\ndtype: float32\nmodels: [{{model: '{base}+{adapter}'}}]\n"
    run("merge", recipe(tmp_path / "r.yml", text), tmp_path / "out")
    merged = load_file(tmp_path / "out" / "model.safetensors")[key]
    torch.testing.assert_close(merged, source(base).read(key) + (b @ a).T)


def test_exceptions_have_the_names_of_tensors_and_of_modules(made, run, tmp_path):
    """vLLM asks for the names of tensors, transformers for those of the modules that it builds."""
    base = tmp_path / "mixtral-fp8"
    section = {"quant_method": "fp8", "weight_block_size": [32, 32], "activation_scheme": "dynamic"}
    fp8.write(made("mixtral"), base, section, lambda key, v: fp8.blocks(v, key, [32, 32], torch.bfloat16))
    tensors = load_file(base / "model.safetensors")
    for key in [key for key in tensors if ".experts." in key]:
        tensors |= fp8.blocks(tensors[key], key, [32, 32], torch.bfloat16)
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    up = "layers.2.mlp.up_proj"
    for folder, first, second in (
        (base, "model.layers.2.block_sparse_moe.experts", "model.layers.2.mlp.experts"),
        (made("gemma3", "nf4"), f"language_model.model.{up}", f"model.language_model.{up}"),
    ):
        out = tmp_path / f"{folder.name}-out"
        run("upscale", folder, out, "--insert", "{after: [1]}")
        section = config_of(out)["quantization_config"]
        named = section.get("llm_int8_skip_modules") or section["modules_to_not_convert"]
        assert {first, second, "lm_head"} <= set(named) and len(set(named)) == len(named)
        # a module with a tensor of its own, and quantised ones below it
        assert "vision_tower.head" not in named


@pytest.mark.parametrize(
    ("key", "value"),
    [("modules_to_not_convert", "lm_head"), ("ignored_layers", {"a": 1}), ("ignore", [["lm_head"]]),
     ("llm_int8_skip_modules", 3), ("dynamic", ["-:lm_head"]), ("dynamic", {"re:(": {}}), ("dynamic", {"a": "b"})],
)  # fmt: skip
def test_malformed_names_are_refused(key, value, made, run, tmp_path):
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "model.safetensors").symlink_to(made("opt", "nf4") / "model.safetensors")
    config = config_of(made("opt", "nf4"))
    config["quantization_config"][key] = value
    (folder / "config.json").write_text(json.dumps(config))
    done = run("upscale", folder, tmp_path / "out", "--preset", "llama_pro", expect=2)
    assert f"malformed {key!r}" in done.err and "config.json" in done.err
