"""Several workers against one, and what a cluster would need for models that no machine holds.

    python benchmarks/scale.py

Measured: up-scaling a 1.1B-shaped model by ``ot_fuse`` with one worker and with two, one thread each, whose results
must be the same bytes; start-up (importing torch, in every worker) is told apart. Simulated: 1 to 64 workers on pieces
of true plans, made from headers of the models' true shapes on sparse files. A worker reads, computes and writes one
piece after another, at a given rate; shares are those of ``--shard-of``. The time of a fused layer is an estimate, from
a measured pair of layers (``--pair``) and the exponent at which it grows with the width.
"""

from __future__ import annotations

import filecmp
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

from common import (
    Figure,
    at_most,
    deus_merge,
    median,
    parser,
    random_checkpoint,
    ratio_at_most,
    report,
    run,
    seconds,
    settle,
    shape_of,
    spread,
    table,
)
from planning import DEEPSEEK, deepseek_layer, make

WORKERS = (1, 2, 4, 8, 16, 32, 64)
NETWORK = 1.25e9  # bytes a second of one worker: 10 Gbit/s
PAIR = 21.0, 14336  # seconds of an 8B-shaped pair of layers on two cores, and the width of its MLP
EXPONENT = 3.0  # measured between 8B and 405B shapes (alignment.py --pair and --large)

LLAMA_405B = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 126, "hidden_size": 16384,
    "intermediate_size": 53248, "num_attention_heads": 128, "num_key_value_heads": 8, "head_dim": 128,
    "vocab_size": 128_256, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}  # fmt: skip


def llama_layer(index: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The tensors of a layer of Llama-3.1-405B."""
    d, f, kv = 16384, 53248, 1024
    shapes = {
        "input_layernorm": (d,), "self_attn.q_proj": (d, d), "self_attn.k_proj": (kv, d), "self_attn.v_proj": (kv, d),
        "self_attn.o_proj": (d, d), "post_attention_layernorm": (d,), "mlp.gate_proj": (f, d), "mlp.up_proj": (f, d),
        "mlp.down_proj": (d, f),
    }  # fmt: skip
    return {f"model.layers.{index}.{name}.weight": ("BF16", shape) for name, shape in shapes.items()}


#: name -> config, layer, preset
GIANTS = {
    "405B, opt_deus": (LLAMA_405B, llama_layer, "opt_deus"),
    "671B in FP8, copy_next": (DEEPSEEK, deepseek_layer, "copy_next"),
}


def main() -> None:
    options = parser(__doc__, runs=3)
    options.add_argument("--layers", type=int, default=0, help="of the 1.1B shape, to try the script")
    options.add_argument("--pair", type=float, default=PAIR[0], help=f"seconds of an 8B-shaped pair ({PAIR[0]})")
    options.add_argument("--only", choices=("workers", "giants"), help="one half of it")
    options = options.parse_args()
    figures: list[Figure] = []
    details: dict = {}
    if options.only != "giants":
        figures += workers(options, details)
    if options.only != "workers":
        figures += giants(options, details)
    report("Many workers", figures, options, details)


def workers(options, details: dict) -> list[Figure]:
    """Two workers against one, in pairs of runs."""
    base = random_checkpoint(options.scratch, shape_of(options))
    arguments = ["upscale", base, "--insert", "{count: 4}", "-j", 1, "--quiet", "--overwrite"]
    outs = {count: options.scratch.resolve() / f"scale-{count}" for count in (1, 2)}
    runs: dict[int, list] = {count: [] for count in outs}
    for _ in range(options.runs):
        for count, out in outs.items():
            settle(base)
            runs[count].append(run(deus_merge(*arguments, out, "--workers", count), sample=False))
    same = filecmp.cmpfiles(*outs.values(), [p.name for p in outs[1].glob("*.safetensors")], shallow=False)
    if same[1] or same[2]:
        sys.exit(f"two workers wrote other bytes: {same}")
    started = min(_start_up() for _ in range(3))
    details |= {f"{count} workers": spread(found) for count, found in runs.items()} | {"start-up": round(started, 2)}
    for out in outs.values():
        shutil.rmtree(out)
    one, two = seconds(runs[1]), seconds(runs[2])
    # a run with workers starts torch twice, one after the other: in itself and, at the same time, in the workers
    bare = median([r.seconds for r in runs[2]]) - 2 * started, median([r.seconds for r in runs[1]]) - started
    return [
        ratio_at_most("ot_fuse, 1.1B, four new layers: two workers", two, one, "s", "one worker", 1.0),
        ratio_at_most("the same without start-up", bare[0], bare[1], "s", "one worker", 1 / 1.7),
    ]


def _start_up() -> float:
    return run([sys.executable, "-c", "import torch"], sample=False).seconds


def giants(options, details: dict) -> list[Figure]:
    """Plans of true shapes, their pieces, and the time of 1 to 64 workers."""
    from deus_merge import api

    figures, rows = [], []
    for name, (config, layer, preset) in GIANTS.items():
        with tempfile.TemporaryDirectory() as folder:
            make(Path(folder), config, layer)
            began = time.process_time()
            plan = api.plan({"base_model": folder, "upscale": {"preset": preset, "insert": "top_half"}})
            found = api.pieces(plan)
            cpu = time.process_time() - began
            figures.append(at_most(f"{name}: planning and pieces, CPU", cpu, "s", 15))
            largest = max(piece.nbytes for piece in found)
            what = f"{name}: {len(found)} pieces of at most {largest / 1e9:.1f} GB; at least 90"
            figures.append(Figure(what, len(found), "", ">= 90", len(found) >= 90))
            times = {count: simulate(found, count, options.pair) for count in WORKERS}
            details[name] = {"pieces": len(found), "minutes": {k: round(v / 60, 1) for k, v in times.items()}}
            rows.append((name, *(f"{times[count] / 60:.1f}" for count in WORKERS)))
    print(
        f"\nsimulated minutes at {NETWORK * 8 / 1e9:.0f} Gbit/s a worker, {options.pair:.0f} s a pair of 8B's layers\n"
    )
    print(table(rows, ("workers", *map(str, WORKERS))))
    return figures


def simulate(found, workers: int, pair: float) -> float:
    """Seconds until the last of some workers has made its share."""
    from deus_merge.plan.pieces import share

    shares = [share(found, number, workers) for number in range(1, workers + 1)]
    return max(sum(_seconds(piece, pair) for piece in one) for one in shares)


def _seconds(piece, pair: float) -> float:
    """Reading, aligning and writing of a piece."""
    read = sum(output.nbytes_read for block in piece.blocks for output in block.outputs)
    widths = [max(max(o.shape) for o in block.outputs if "mlp" in o.name) for block in piece.blocks if block.merges]
    return (read + piece.nbytes) / NETWORK + sum(pair * (width / PAIR[1]) ** EXPONENT for width in widths)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
