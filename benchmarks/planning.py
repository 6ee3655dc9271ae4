"""How long it takes to plan the up-scaling of a model with very many tensors, in headers alone.

    python benchmarks/planning.py

The model has Qwen3-235B-A22B's shape: 94 layers of 128 experts, 36 000 tensors. Its files are sparse: they have headers
and sizes, but take no space. The time is that of a whole process, from start to the plan as JSON.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

LAYERS, EXPERTS, HIDDEN, WIDTH, HEADS, GROUPS, HEAD, VOCABULARY = 94, 128, 4096, 1536, 64, 4, 128, 151_936
CONFIG = {
    "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "num_hidden_layers": LAYERS,
    "num_experts": EXPERTS, "num_experts_per_tok": 8, "hidden_size": HIDDEN, "moe_intermediate_size": WIDTH,
    "intermediate_size": 12288, "num_attention_heads": HEADS, "num_key_value_heads": GROUPS, "head_dim": HEAD,
    "vocab_size": VOCABULARY, "mlp_only_layers": [], "decoder_sparse_step": 1, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}  # fmt: skip


def layer(index: int) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the tensors of a layer."""
    prefix = f"model.layers.{index}."
    attention = {"q": (HEADS * HEAD, HIDDEN), "k": (GROUPS * HEAD, HIDDEN), "v": (GROUPS * HEAD, HIDDEN)}
    tensors = {f"{prefix}self_attn.{role}_proj.weight": shape for role, shape in attention.items()}
    tensors |= {f"{prefix}self_attn.o_proj.weight": (HIDDEN, HEADS * HEAD)}
    tensors |= {f"{prefix}self_attn.{role}_norm.weight": (HEAD,) for role in "qk"}
    tensors |= {f"{prefix}{norm}_layernorm.weight": (HIDDEN,) for norm in ("input", "post_attention")}
    tensors[f"{prefix}mlp.gate.weight"] = (EXPERTS, HIDDEN)
    for e in range(EXPERTS):
        tensors |= {f"{prefix}mlp.experts.{e}.{role}_proj.weight": (WIDTH, HIDDEN) for role in ("gate", "up")}
        tensors[f"{prefix}mlp.experts.{e}.down_proj.weight"] = (HIDDEN, WIDTH)
    return tensors


def write(file: Path, tensors: dict[str, tuple[int, ...]]) -> None:
    """A safetensors file in bfloat16 that has a header, and no data."""
    header, at = {}, 0
    for name, shape in tensors.items():
        size = 2 * shape[0] * (shape[1] if len(shape) > 1 else 1)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        out.truncate(8 + len(text) + at)


def make(folder: Path) -> int:
    """The model, a file a layer; the number of its tensors."""
    ends = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN), "model.norm.weight": (HIDDEN,)}
    parts = [ends | {"lm_head.weight": (VOCABULARY, HIDDEN)}, *(layer(i) for i in range(LAYERS))]
    where = {}
    for i, tensors in enumerate(parts):
        write(folder / f"model-{i:05}.safetensors", tensors)
        where |= dict.fromkeys(tensors, f"model-{i:05}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return len(where)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        count = make(Path(folder))
        for preset in ("opt_deus", "llama_pro", "solar"):
            recipe = Path(folder, f"{preset}.yml")
            recipe.write_text(f"base_model: {folder}\nupscale: {{preset: {preset}}}\n")
            times = []
            for _ in range(3):
                started = time.perf_counter()
                subprocess.run(
                    [sys.executable, "-m", "deus_merge", "plan", recipe, "--json"], check=True, capture_output=True
                )
                times.append(time.perf_counter() - started)
            print(f"{preset}: {count} tensors planned in {statistics.median(times):.2f} s (median of {len(times)})")


if __name__ == "__main__":
    main()
