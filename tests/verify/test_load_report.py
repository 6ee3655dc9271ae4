"""What ``verify`` learns from transformers: names that would not load, and layers of another kind than they were."""

from __future__ import annotations

import json
import resource
from pathlib import Path

import pytest
import torch
import transformers
from outputs import edit_json, reseal
from safetensors.torch import load_file, save_file
from support import make_model, write_recipe

from deus_merge.models.built import build, main_stack, resolved_config
from deus_merge.models.layer_description import describe_stack
from deus_merge.models.load_report import load_report

SMALL = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 6, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "n_group": 1, "topk_group": 1}
FAMILIES = {
    "gemma2": {"sliding_window": 8},
    "vaultgemma": {"sliding_window": 8},
    "gemma3_text": {"sliding_window": 8, "sliding_window_pattern": 3},
    "qwen2": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 3},
    "smollm3": {},
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {**EXPERTS, "mlp_only_layers": [4]},
    "deepseek_v3": {**LATENT, **ROUTED, "first_k_dense_replace": 2, "num_key_value_heads": 4},
    "gpt2": {"n_embd": 32, "n_head": 4, "n_layer": 6},
    "jamba": {"mamba_d_state": 8, "mamba_dt_rank": 4, "attn_layer_period": 3, "attn_layer_offset": 1, "num_experts": 4},
}  # fmt: skip


def make(folder: Path, kind: str, **changes) -> Path:
    settings = {**SMALL, **FAMILIES[kind], **changes}
    config = transformers.AutoConfig.for_model(kind, **settings)
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).float().save_pretrained(folder)
    return folder


def merge(run, base: Path, out: Path, *ranges: list[int]) -> Path:
    slices = [f"  - sources: [{{model: {base}, layer_range: {r}}}]\n" for r in ranges or ([0, 6],)]
    recipe = write_recipe(out.parent / "recipe.yml", "merge_method: passthrough\nslices:\n" + "".join(slices))
    run("merge", recipe, out)
    return out


def failures(run, out: Path) -> dict[str, str]:
    done = run("verify", out, "--json", expect=3)
    return {c["name"]: c["detail"] for c in done.json()["checks"] if c["passed"] is False}


def edit_tensors(out: Path, change) -> None:
    file = out / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    made: dict[str, Path] = {}

    def base(kind: str) -> Path:
        if kind not in made:
            made[kind] = make(folder / kind, kind)
        return made[kind]

    return base


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_right_output_passes(run, tmp_path, bases, kind):
    """Also where the tensors of a file have other names, and other shapes, than those of the modules."""
    out = merge(run, bases(kind), tmp_path / "out")
    checks = {c["name"]: c for c in run("verify", out, "--strict", "--json").json()["checks"]}
    assert "names and shapes" in checks["transformers"]["detail"] and "6 layers" in checks["layer kinds"]["detail"]


def test_a_deeper_output_of_one_kind_passes(run, tmp_path, bases):
    out = merge(run, bases("mixtral"), tmp_path / "out", [0, 3], [2, 6])
    checks = {c["name"]: c for c in run("verify", out, "--strict", "--json").json()["checks"]}
    assert checks["layer kinds"]["detail"].startswith("7 layers of 1 kind")


def swap_types(config: dict) -> None:
    types = config["layer_types"]
    types[2], types[3] = types[3], types[2]


def move(key: str, value):
    def change(config: dict) -> None:
        assert config[key] != value
        config[key] = value

    return change


@pytest.mark.parametrize(
    ("kind", "change", "words"),
    [
        ("gemma2", swap_types, ["layer 2", "layer_types"]),
        ("gemma2", lambda c: c.update(layer_types=["full_attention"] * 6), ["layer 0", "full_attention"]),
        ("qwen2", swap_types, ["layer 2", "layer_types"]),
        ("smollm3", lambda c: c["no_rope_layers"].__setitem__(3, 1), ["layer 3", "no_rope_layers"]),
        ("qwen3_moe", move("mlp_only_layers", [3]), ["layer 3", "layer 4", "mlp_only_layers"]),
        ("deepseek_v3", move("first_k_dense_replace", 1), ["layer 1", "first_k_dense_replace"]),
    ],
)
def test_kinds_that_the_config_moves(run, tmp_path, bases, kind, change, words):
    """Of described and undescribed families alike."""
    out = merge(run, bases(kind), tmp_path / "out")
    config = json.loads((out / "config.json").read_text())
    change(config)
    (out / "config.json").write_text(json.dumps(config))
    reseal(out)
    found = failures(run, out)
    assert all(word in found["layer kinds"] for word in words), found


def test_a_pattern_instead_of_a_list(run, tmp_path, bases):
    """As Gemma 3 is published: the config has no list, and another pattern makes other kinds."""
    base = make(tmp_path / "base", "gemma3_text")
    edit_json(base / "config.json", layer_types=None, sliding_window_pattern=3)
    out = merge(run, base, tmp_path / "out")
    assert run("verify", out, "--strict").code == 0
    edit_json(out / "config.json", sliding_window_pattern=2)
    reseal(out)
    assert "sliding_window_pattern" in failures(run, out)["layer kinds"]


def rename(tensors: dict) -> None:
    tensors["model.layers.1.self_attn.wrong.weight"] = tensors.pop("model.layers.1.self_attn.q_proj.weight")


@pytest.mark.parametrize(
    ("kind", "change", "words"),
    [
        ("vaultgemma", rename, ["layers.1.self_attn.q_proj.weight is missing", "self_attn.wrong.weight is unexpected"]),
        ("vaultgemma", lambda t: t.pop("model.norm.weight"), ["model.norm.weight is missing"]),
        ("vaultgemma", lambda t: t.update({"model.norm.weight": torch.ones(31)}), ["[31]", "[32] expected"]),
        ("qwen3_moe", lambda t: t.pop("model.layers.1.mlp.experts.2.up_proj.weight"), ["layers.1.mlp.experts.gate_up"]),
        ("qwen3_moe", lambda t: t.pop("model.layers.2.mlp.experts.3.down_proj.weight"), ["layers.2.mlp.experts.down"]),
        ("mixtral", lambda t: t.pop("model.layers.0.block_sparse_moe.experts.0.w2.weight"), ["layers.0.", "down_proj"]),
    ],
)  # fmt: skip
def test_names_that_do_not_load(run, tmp_path, bases, kind, change, words):
    out = merge(run, bases(kind), tmp_path / "out")
    edit_tensors(out, change)
    found = failures(run, out)
    assert all(word in found["transformers"] for word in words), found


def test_a_base_that_does_not_load_cleanly_excuses_the_same_and_no_more(run, tmp_path):
    base = make(tmp_path / "base", "vaultgemma")

    def spoil(tensors: dict) -> None:
        tensors.pop("model.layers.1.pre_feedforward_layernorm.weight")
        tensors["model.layers.2.mlp.extra"] = torch.zeros(3)

    edit_tensors(base, spoil)
    out = merge(run, base, tmp_path / "out")
    checks = {c["name"]: c for c in run("verify", out, "--json").json()["checks"]}
    assert "loads as its base does: 1 missing, 1 unexpected" in checks["transformers"]["detail"]
    edit_tensors(out, lambda t: t.pop("model.layers.3.pre_feedforward_layernorm.weight"))
    assert "layers.3.pre_feedforward_layernorm.weight is missing" in failures(run, out)["transformers"]


def test_a_tower_of_another_depth_than_the_config_builds(run, tmp_path):
    """Qwen2.5-VL has its depth twice; where one of them is wrong, layers are dropped at load."""
    text = {**SMALL, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}}
    vision = {"depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 32, "out_hidden_size": 32}
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    transformers.Qwen2_5_VLForConditionalGeneration(config).save_pretrained(tmp_path / "base")
    out = merge(run, tmp_path / "base", tmp_path / "out")
    assert run("verify", out, "--strict").code == 0
    saved = json.loads((out / "config.json").read_text())
    saved["text_config"]["num_hidden_layers"] = 4
    saved["num_hidden_layers"] = 6
    saved["text_config"]["layer_types"] = saved["text_config"]["layer_types"][:4]
    (out / "config.json").write_text(json.dumps(saved))
    reseal(out)
    found = failures(run, out)
    assert "layers.4." in found["transformers"] and "builds 4 layers" in found["layer kinds"]


def test_what_transformers_does_not_know_is_skipped_and_strict_fails(run, tmp_path):
    base = make_model(tmp_path / "base", "llama", layers=6)
    edit_json(base / "config.json", model_type="unheard_of", architectures=None)
    out = merge(run, base, tmp_path / "out")
    checks = {c["name"]: c for c in run("verify", out, "--json").json()["checks"]}
    for name in ("transformers", "layer kinds"):
        assert checks[name]["passed"] is None and "does not know model_type 'unheard_of'" in checks[name]["detail"]
    run("verify", out, "--strict", expect=3)


def test_a_base_that_is_gone(run, tmp_path):
    """The manifest has its config; a clean output needs no more."""
    base = make(tmp_path / "base", "gemma2")
    out = merge(run, base, tmp_path / "out")
    base.rename(tmp_path / "elsewhere")
    checks = {c["name"]: c for c in run("verify", out, "--json").json()["checks"]}
    assert checks["transformers"]["passed"] and checks["layer kinds"]["passed"]
    edit_tensors(out, rename)
    done = run("verify", out, "--json", expect=3)  # the plan has other names
    checks = {c["name"]: c for c in done.json()["checks"]}
    assert checks["transformers"]["passed"] is not True


def test_a_large_model_takes_no_memory():
    """70 billion parameters: names and shapes alone."""
    config = transformers.LlamaConfig(
        hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64,
        num_key_value_heads=8, vocab_size=128256,
    )  # fmt: skip
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    model = build(resolved_config(config.to_dict()))
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert load_report(model, shapes).clean
    assert len({layer.same_function() for layer in describe_stack(model, main_stack(model))}) == 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # KiB
