"""How long it takes to plan the up-scaling of a model with very many tensors, in headers alone.

    python benchmarks/planning.py

One model has Qwen3-235B-A22B's shape: 94 layers of 128 experts, 36 000 tensors. The other has DeepSeek-V3's, in FP8
with a tensor of scales beside each weight: 58 layers of 256 experts, 90 000 tensors. Their files are sparse: they have
headers and sizes, but take no space. The time is that of a whole process, from start to the plan as JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

Tensors = dict[str, tuple[str, tuple[int, ...]]]  # name -> dtype, shape

LAYERS, EXPERTS, HIDDEN, WIDTH, HEADS, GROUPS, HEAD, VOCABULARY = 94, 128, 4096, 1536, 64, 4, 128, 151_936
CONFIG = {
    "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "num_hidden_layers": LAYERS,
    "num_experts": EXPERTS, "num_experts_per_tok": 8, "hidden_size": HIDDEN, "moe_intermediate_size": WIDTH,
    "intermediate_size": 12288, "num_attention_heads": HEADS, "num_key_value_heads": GROUPS, "head_dim": HEAD,
    "vocab_size": VOCABULARY, "mlp_only_layers": [], "decoder_sparse_step": 1, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}  # fmt: skip
DEEPSEEK = {
    "model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"], "num_hidden_layers": 61,
    "first_k_dense_replace": 3, "moe_layer_freq": 1, "n_routed_experts": 256, "n_shared_experts": 1,
    "num_experts_per_tok": 8, "n_group": 8, "topk_group": 4, "hidden_size": 7168, "intermediate_size": 18432,
    "moe_intermediate_size": 2048, "num_attention_heads": 128, "num_key_value_heads": 128, "q_lora_rank": 1536,
    "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "vocab_size": 129_280,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "quantization_config": {
        "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128],
    },
}  # fmt: skip


def qwen_layer(index: int) -> Tensors:
    """The tensors of a layer of Qwen3-235B-A22B."""
    prefix = f"model.layers.{index}."
    attention = {"q": (HEADS * HEAD, HIDDEN), "k": (GROUPS * HEAD, HIDDEN), "v": (GROUPS * HEAD, HIDDEN)}
    shapes = {f"{prefix}self_attn.{role}_proj.weight": shape for role, shape in attention.items()}
    shapes |= {f"{prefix}self_attn.o_proj.weight": (HIDDEN, HEADS * HEAD)}
    shapes |= {f"{prefix}self_attn.{role}_norm.weight": (HEAD,) for role in "qk"}
    shapes |= {f"{prefix}{norm}_layernorm.weight": (HIDDEN,) for norm in ("input", "post_attention")}
    shapes[f"{prefix}mlp.gate.weight"] = (EXPERTS, HIDDEN)
    for e in range(EXPERTS):
        shapes |= {f"{prefix}mlp.experts.{e}.{role}_proj.weight": (WIDTH, HIDDEN) for role in ("gate", "up")}
        shapes[f"{prefix}mlp.experts.{e}.down_proj.weight"] = (HIDDEN, WIDTH)
    return {name: ("BF16", shape) for name, shape in shapes.items()}


def deepseek_layer(index: int) -> Tensors:
    """The tensors of a layer of DeepSeek-V3: codes and scales of its matrices, norms and router as they are."""
    prefix, tensors = f"model.layers.{index}.", Tensors()

    def matrix(name: str, out: int, into: int) -> None:
        tensors[f"{prefix}{name}.weight"] = "F8_E4M3", (out, into)
        tensors[f"{prefix}{name}.weight_scale_inv"] = "F32", (-(-out // 128), -(-into // 128))

    def mlp(name: str, width: int) -> None:
        matrix(f"{name}.gate_proj", width, 7168)
        matrix(f"{name}.up_proj", width, 7168)
        matrix(f"{name}.down_proj", 7168, width)

    matrix("self_attn.q_a_proj", 1536, 7168)
    matrix("self_attn.q_b_proj", 128 * 192, 1536)
    matrix("self_attn.kv_a_proj_with_mqa", 512 + 64, 7168)
    matrix("self_attn.kv_b_proj", 128 * 256, 512)
    matrix("self_attn.o_proj", 7168, 128 * 128)
    norms = {"self_attn.q_a": 1536, "self_attn.kv_a": 512, "input": 7168, "post_attention": 7168}
    tensors |= {f"{prefix}{norm}_layernorm.weight": ("BF16", (size,)) for norm, size in norms.items()}
    if index < 3:
        mlp("mlp", 18432)
        return tensors
    tensors[f"{prefix}mlp.gate.weight"] = "BF16", (256, 7168)
    tensors[f"{prefix}mlp.gate.e_score_correction_bias"] = "F32", (256,)
    for module in ("shared_experts", *(f"experts.{e}" for e in range(256))):
        mlp(f"mlp.{module}", 2048)
    return tensors


MODELS: dict[str, tuple[dict, Callable[[int], Tensors]]] = {
    "Qwen3-235B-A22B": (CONFIG, qwen_layer),
    "DeepSeek-V3 in FP8": (DEEPSEEK, deepseek_layer),
}


def write(file: Path, tensors: Tensors) -> None:
    """A safetensors file that has a header, and no data."""
    header, at = {}, 0
    for name, (dtype, shape) in tensors.items():
        size = {"F8_E4M3": 1, "BF16": 2, "F32": 4}[dtype] * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        out.truncate(8 + len(text) + at)


def make(folder: Path, config: dict, layer: Callable[[int], Tensors]) -> int:
    """A model, a file a layer; the number of its tensors."""
    table = "BF16", (config["vocab_size"], config["hidden_size"])
    ends = {"model.embed_tokens.weight": table, "model.norm.weight": ("BF16", (config["hidden_size"],))}
    parts = [ends | {"lm_head.weight": table}, *(layer(i) for i in range(config["num_hidden_layers"]))]
    where = {}
    for i, tensors in enumerate(parts):
        write(folder / f"model-{i:05}.safetensors", tensors)
        where |= dict.fromkeys(tensors, f"model-{i:05}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    (folder / "config.json").write_text(json.dumps(config))
    return len(where)


def main() -> None:
    options = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    options.add_argument("--runs", type=int, default=3, help="runs of each; the median counts (3)")
    options = options.parse_args()
    for name, (config, layer) in MODELS.items():
        with tempfile.TemporaryDirectory() as folder:
            count = make(Path(folder), config, layer)
            for preset, places in (("opt_deus", ", insert: top_half"), ("llama_pro", ""), ("solar", "")):
                recipe = Path(folder, f"{preset}.yml")
                recipe.write_text(f"base_model: {folder}\nupscale: {{preset: {preset}{places}}}\n")
                times = []
                for _ in range(options.runs):
                    started = time.perf_counter()
                    subprocess.run(
                        [sys.executable, "-m", "deus_merge", "plan", recipe, "--json"], check=True, capture_output=True
                    )
                    times.append(time.perf_counter() - started)
                median = statistics.median(times)
                print(f"{name}, {preset}: {count} tensors planned in {median:.2f} s (median of {len(times)})")


if __name__ == "__main__":
    main()
