"""``ot_fuse`` on a 1.1B-shaped checkpoint: peak memory, its growth with depth, and the plain way beside it.

The plain way is what a script of a page does: base and deeper model in memory in float32, every plan with POT's
Sinkhorn on whole matrices, the coupling applied as it is (the arithmetic of the authors' script), ``save_pretrained``
in the base's dtype. It runs from this file, in a process of its own: ``ot_fuse_memory.py --plain BASE OUT``.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path

from common import (
    Figure,
    Run,
    at_most,
    deus_merge,
    megabytes,
    parser,
    random_checkpoint,
    ratio_at_most,
    report,
    run,
    seconds,
    settle,
    shape_of,
    spread,
)

REG, ITERATIONS = 0.06, 10_000


def main() -> None:
    options = parser(__doc__, runs=2)
    options.add_argument("--layers", type=int, help="of the base (22); the deeper one has twice as many")
    options.add_argument("--preset", default="opt_deus_paper")
    options.add_argument("--skip-plain", action="store_true", help="leave out the plain way (minutes, 11 GB)")
    options.add_argument("--skip-deeper", action="store_true", help="leave out the base with twice as many layers")
    options.add_argument("--plain-runs", type=int, default=1)
    options = options.parse_args()
    shape = shape_of(options)
    new = shape.layers // 2
    deeper = replace(shape, layers=2 * shape.layers)
    bases = {"ours": random_checkpoint(options.scratch, shape)}
    if not options.skip_deeper:
        bases["ours, deeper base"] = random_checkpoint(options.scratch, deeper)
    out = options.scratch.resolve() / "ot-fuse-out"
    shutil.rmtree(out, ignore_errors=True)

    def ours(base: Path, *more: str) -> list[str]:
        where = "top_half" if base == bases["ours"] else f"{{count: {new}, where: top}}"
        return deus_merge("upscale", base, out, "--preset", options.preset, "--insert", where, "--quiet", *more)

    plan = json.loads(run(ours(bases["ours"], "--dry-run", "--json")).stdout)
    runs: dict[str, list[Run]] = {name: [] for name in (*bases, "plain")}
    plans: list[dict] = []
    try:
        for turn in range(options.runs):
            for name, base in bases.items():
                if turn and name != "ours":  # asked for its memory alone
                    continue
                settle(base)
                runs[name].append(run(ours(base)))
                plans = plans_of(out) if name == "ours" else plans
                shutil.rmtree(out)
            if turn < options.plain_runs and not options.skip_plain:
                settle(bases["ours"])
                runs["plain"].append(run([sys.executable, __file__, "--plain", bases["ours"], out]))
                shutil.rmtree(out)
    finally:
        shutil.rmtree(out, ignore_errors=True)

    what = f"{options.preset} {shape.layers} -> {shape.layers + new} layers, hidden {shape.hidden}"
    mine, time_ = runs["ours"], seconds(runs["ours"])
    figures = [at_most(f"{what}: peak anonymous memory", megabytes(mine), "MB", 1600)]
    details = {name: spread(r) for name, r in runs.items() if r}
    if deep := runs.get("ours, deeper base"):
        figures.append(
            ratio_at_most(
                f"the same {new} new layers on {deeper.layers} layers",
                megabytes(deep), megabytes(mine[: len(deep)]), "MB", f"on {shape.layers} layers", 1.05,
            )
        )  # fmt: skip
    estimate = plan["peak_memory_bytes"] / 1e6
    figures.append(
        Figure("memory: measured against the plan's estimate", megabytes(mine), "MB", "", None, estimate, "estimate")
    )
    if plain := runs["plain"]:
        told = json.loads(plain[-1].stdout.splitlines()[-1])
        details["plain way's stages"] = told["stages"]
        figures += [
            ratio_at_most(f"{what}: time", time_, seconds(plain), "s", "plain way", 1 / 2),
            ratio_at_most(f"{what}: memory", megabytes(mine), megabytes(plain), "MB", "plain way", 1 / 7),
        ]
    else:
        figures.append(Figure(f"{what}: time", time_, "s"))
    details["seconds in plans, one run"] = round(sum(p["seconds"] for p in plans), 2)
    worst = max(p["marginal_error"] for p in plans)
    figures.append(Figure("largest L1 marginal error of a plan", worst, "", "<= 1e-4", worst <= 1e-4))
    report(Path(__file__).stem, figures, options, details)


def plans_of(out: Path) -> list[dict]:
    """The diagnostics of every plan of a finished output."""
    record = json.loads((out / "deus_merge.json").read_text())
    return [d for layer in record["layers"] for d in layer["diagnostics"] if "marginal_error" in d]


def plain_way(base: str, out: str) -> None:
    """The published arithmetic the plain way; prints its plans and its stages as JSON."""
    import ot
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    stages: dict[str, float] = {}
    at = time.perf_counter()

    def stage(name: str) -> None:
        nonlocal at
        now = time.perf_counter()
        stages[name] = round(stages.get(name, 0.0) + now - at, 2)
        at = now

    plans: list[dict] = []

    def plan(role: str, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        stage("fusing")
        cost = torch.cdist(a, b)  # (n, n)
        uniform = torch.full((len(cost),), 1 / len(cost))  # (n,)
        stage("costs")
        coupling, log = ot.sinkhorn(uniform, uniform, cost, REG, numItermax=ITERATIONS, log=True, warn=False)  # (n, n)
        stage("plans")
        error = (coupling.sum(1) - uniform).abs().sum() + (coupling.sum(0) - uniform).abs().sum()
        plans.append({"role": role, "iterations": int(log.get("niter", 0)), "marginal_error": error.item()})
        return coupling

    def fuse(a: dict, b: dict) -> dict:
        new = {"input_layernorm": (a["input_layernorm"] + b["input_layernorm"]) / 2}
        for role in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"):
            coupling = plan(role, a[role], b[role])
            new[role] = (coupling.T @ a[role] + b[role]) / 2
        flow = coupling  # (d, d), of o
        n2 = "post_attention_layernorm"
        new[n2] = (a[n2] @ (flow + torch.eye(len(flow))) / 2 + b[n2]) / 2
        for role in ("mlp.gate_proj", "mlp.up_proj"):
            moved = a[role] @ flow  # (f, d)
            new[role] = (plan(role, moved, b[role]).T @ moved + b[role]) / 2
        role = "mlp.down_proj"
        plan(role, a[role], b[role])
        for role in ("self_attn.o_proj", "mlp.down_proj"):
            new[role] = torch.zeros_like(a[role])
        stage("fusing")
        return new

    warnings.simplefilter("ignore")  # POT says where its plans are void; the marginal errors say it as well
    with torch.no_grad():
        config = AutoConfig.from_pretrained(base)
        n = config.num_hidden_layers
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        dtype = config.dtype or torch.bfloat16
        config.num_hidden_layers = n + n // 2
        deeper = AutoModelForCausalLM.from_pretrained(base, config=config, dtype=torch.float32)
        stage("loading")
        old, place = model.state_dict(), deeper.state_dict()

        def layer(tensors: dict, i: int) -> dict:
            at = f"model.layers.{i}."
            return {k[len(at) : -len(".weight")]: v for k, v in tensors.items() if k.startswith(at)}

        target = 0
        for i in range(n):
            for role, tensor in layer(place, target).items():
                tensor.copy_(layer(old, i)[role])
            target += 1
            if n - 1 - n // 2 <= i < n - 1:
                fused = fuse(layer(old, i), layer(old, i + 1))
                for role, tensor in layer(place, target).items():
                    tensor.copy_(fused[role])
                target += 1
        stage("fusing")
        del old, place  # they hold the float32 tensors
        deeper.to(dtype).save_pretrained(out)
        stage("saving")
    print(json.dumps({"plans": plans, "stages": stages}))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--plain"]:
        plain_way(*sys.argv[2:4])
    else:
        main()
