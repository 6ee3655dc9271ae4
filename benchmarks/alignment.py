"""What ``alignment: symmetry`` does that ``transport_flow`` cannot, on real layers; and two layers of an 8B model.

1. A random element of the group of symmetries is planted in a layer of SmolLM2-135M, which is then aligned back to the
   original: what is left of the distance. Also with 20 % noise on top.
2. Every layer is aligned to its upper neighbour and nothing is fused: how far the model's logits move, in float64.
3. How much closer neighbouring layers come, and how long that takes.
4. Two random bfloat16 layers of 8B shape (d 4096, f 14336, 32 heads, 8 key-value heads) are up-scaled to three: time
   and memory of the whole command (``--pair``: only this; ``--no-pair``: without it). ``--large``: instead two layers
   of a 405B model with ``--max-memory 7GB``, once: 45 GB of disk, half an hour.
"""

from __future__ import annotations

import shutil
import sys
import time
from pathlib import Path

from common import (
    Figure,
    Shape,
    at_most,
    deus_merge,
    median,
    megabytes,
    parser,
    random_checkpoint,
    report,
    run,
    seconds,
    settle,
    spread,
)  # fmt: skip

PAIR = Shape(layers=2, hidden=4096, intermediate=14336, heads=32, kv_heads=8, vocabulary=1024)
LARGE = Shape(layers=2, hidden=16384, intermediate=53248, heads=128, kv_heads=8, vocabulary=1024)
TINY = Shape(layers=2, hidden=256, intermediate=704, heads=8, kv_heads=2, vocabulary=512)
TEXT = "The layers of a network have no order of neurons of their own: any permutation computes the same function."
ALIGNMENTS = ("symmetry", "transport_flow", "none")


def main() -> None:
    options = parser(__doc__, runs=3)
    options.add_argument("--model", type=Path, help="a converted SmolLM2; by default one is made in the scratch folder")
    options.add_argument("--layers", type=int, nargs="*", default=[2, 14, 26], help="layers that symmetries go into")
    options.add_argument("--pair", action="store_true", help="only the pair of 8B-shaped layers")
    options.add_argument("--large", action="store_true", help="only a pair of 405B-shaped layers")
    options.add_argument("--no-pair", action="store_true", help="without it")
    options = options.parse_args()
    figures, details = [], {}
    options.pair |= options.large
    if not options.pair:
        if options.model is None:
            from deus_merge.models.demo import smollm2

            options.model = smollm2(options.scratch.resolve())
        model = Layers(options.model)
        figures += planted(model, options.layers)
        figures += function(model, 3 if options.small else model.depth)
        figures += neighbours(model, options.layers[:1] if options.small else options.layers, details)
    if not options.no_pair:
        figures += pair(options, details)
    report(Path(__file__).stem, figures, options, details)


class Layers:
    """The layers of a checkpoint by role."""

    def __init__(self, folder: Path):
        from deus_merge.models.head_layout import layer_heads
        from deus_merge.models.reference import ModelRef
        from deus_merge.models.source import SourceModel

        self.folder = folder
        self.source = SourceModel.open(ModelRef(str(folder)), {})
        self.depth, self.view = self.source.view.num_layers, self.source.view
        self.heads = layer_heads(self.source.checkpoint.config, self.view)
        self.specs = [self.view.spec(role) for role in self.view.layers[0]]

    def layer(self, index: int, dtype) -> dict:
        return {role: self.source.checkpoint.read(name).to(dtype) for role, name in self.view.layers[index].items()}

    def align(self, a: dict, b: dict, alignment: str, dtype: str) -> dict:
        """Layer A as the alignment leaves it, nothing fused."""
        from deus_merge.align import align_layer
        from deus_merge.align.options import AlignOptions

        options = AlignOptions(
            alignment=alignment, heads=self.heads, unit_rows=True, cost_scale="max", compute_dtype=dtype
        )
        return {chunk.role: chunk.values for chunk in align_layer(a, b, self.specs, options)}

    def plant(self, b: dict, seed: int) -> dict:
        """The layer under a random symmetry."""
        import torch

        sys.path.append(str(Path(__file__).parents[1] / "tests" / "align"))
        from symmetries import random_symmetry

        attention = random_symmetry(self.heads, seed)
        neurons = torch.randperm(len(b["gate"]), generator=torch.Generator().manual_seed(seed))
        moved = dict(b)
        for role, x in b.items():
            spec = self.view.spec(role)
            if role in ("gate", "up", "down"):
                moved[role] = x[:, neurons] if role == "down" else x[neurons]
            elif role in ("q", "k", "v", "o"):
                moved[role] = attention.move(x, spec.in_space, spec.out_space)
        return moved


def distance(x: dict, y: dict) -> float:
    """‖x - y‖ / ‖y‖ over all matrices of a layer."""
    matrices = [role for role in y if y[role].ndim == 2]
    top = sum((x[r].double() - y[r].double()).square().sum().item() for r in matrices)
    return (top / sum(y[r].double().square().sum().item() for r in matrices)) ** 0.5


def planted(model: Layers, layers: list[int]) -> list[Figure]:
    """What is left of a planted symmetry."""
    import torch

    figures = []
    for dtype, bar in (("float64", 1e-12), ("float32", 1e-5)):
        left: dict[str, list[float]] = {name: [] for name in ALIGNMENTS}
        for index in layers:
            b = model.layer(index, torch.float64)
            a = model.plant(b, seed=index)
            a, b = ({r: t.to(getattr(torch, dtype)) for r, t in x.items()} for x in (a, b))
            for name in ALIGNMENTS:
                left[name].append(distance(model.align(a, b, name, dtype), b))
        worst = max(left["symmetry"])
        figures.append(
            Figure(f"planted symmetry in layers {layers}, {dtype}: distance left, worst", worst, "", f"<= {bar:g}",
                   worst <= bar, min(left["transport_flow"]), "transport_flow, best")
        )  # fmt: skip
    figures.append(Figure("the same without any alignment, best", min(left["none"]), ""))
    noisy = []
    for index in layers:
        b = model.layer(index, torch.float64)
        random = torch.Generator().manual_seed(index)
        a = {r: x + 0.2 * x.std() * torch.randn(x.shape, generator=random, dtype=x.dtype) for r, x in b.items()}
        noise = distance(a, b)
        noisy.append(distance(model.align(model.plant(a, seed=index), b, "symmetry", "float64"), b) / noise)
    figures.append(at_most("with 20 % noise: distance left over the noise's own, worst", max(noisy), "", 1 + 1e-9))
    return figures


def function(model: Layers, depth: int) -> list[Figure]:
    """How far the logits move when every layer below is aligned to its neighbour."""
    import torch
    import transformers

    ids = transformers.AutoTokenizer.from_pretrained(model.folder)(TEXT, return_tensors="pt")["input_ids"]
    moved = {}
    for name in ALIGNMENTS[:2]:
        network = transformers.AutoModelForCausalLM.from_pretrained(model.folder, dtype=torch.float64).eval()
        for module in network.modules():  # transformers norms in float32 whatever the model's dtype
            if type(module).__name__.endswith("RMSNorm"):
                module.forward = _norm_in_float64.__get__(module)
        with torch.no_grad():
            want = network(ids).logits
            state = network.state_dict()
            for index in range(depth - 1):
                a, b = (model.layer(i, torch.float64) for i in (index, index + 1))
                for role, tensor in model.align(a, b, name, "float64").items():
                    state[model.view.layers[index][role]].copy_(tensor)
            moved[name] = (network(ids).logits - want).abs().max().item()
    what = f"{depth - 1} layers aligned to their neighbours, float64: largest change of a logit"
    ours, peer = moved.values()
    return [Figure(what, ours, "", "<= 1e-10", ours <= 1e-10, peer, "transport_flow")]


def _norm_in_float64(self, x):
    return self.weight * x * (x.square().mean(-1, keepdim=True) + self.variance_epsilon).rsqrt()


def neighbours(model: Layers, layers: list[int], details: dict) -> list[Figure]:
    """How much closer A comes to B, and the time of each alignment."""
    import torch

    far: dict[str, list[float]] = {name: [] for name in ALIGNMENTS}
    took: dict[str, list[float]] = {name: [] for name in ALIGNMENTS}
    cosines: dict[str, list[float]] = {name: [] for name in ALIGNMENTS}
    for index in layers:
        a, b = (model.layer(i, torch.float32) for i in (index, index + 1))
        for name in ALIGNMENTS:
            start = time.perf_counter()
            moved = model.align(a, b, name, "float32")
            took[name].append(time.perf_counter() - start)
            far[name].append(distance(moved, b))
            rows = [torch.cosine_similarity(moved[r], b[r], dim=1).mean().item() for r in ("q", "k", "v", "gate", "up")]
            cosines[name].append(median(rows))
    details["neighbours"] = {"layers": layers, "distance": far, "median role's mean cosine": cosines, "seconds": took}
    print(details["neighbours"])
    return [
        Figure("neighbouring layers: median of the mean cosine of rows", median(cosines["symmetry"]), "",
               peer=median(cosines["transport_flow"]), peer_name="transport_flow"),
        Figure("the same without alignment", median(cosines["none"]), ""),
        Figure("aligning one pair of SmolLM2's layers", median(took["symmetry"]), "s",
               peer=median(took["transport_flow"]), peer_name="transport_flow"),
    ]  # fmt: skip


def pair(options, details: dict) -> list[Figure]:
    """Two layers of an 8B or a 405B model become three."""
    shape = TINY if options.small else LARGE if options.large else PAIR
    base = random_checkpoint(options.scratch, shape)
    out = options.scratch.resolve() / "pair-out"
    runs = []
    limit = ("--max-memory", "7GB") if options.large else ()
    for _ in range(1 if options.small or options.large else options.runs):
        shutil.rmtree(out, ignore_errors=True)
        settle(base)
        runs.append(run(deus_merge("upscale", base, out, "--insert", "all", "--quiet", *limit)))
    shutil.rmtree(out, ignore_errors=True)
    details["pair"] = spread(runs)
    what = f"pair of layers, d {shape.hidden}, f {shape.intermediate}, random bfloat16, opt_deus: "
    return [
        at_most(what + "time of the command", seconds(runs), "s", 3600 if options.large else 60),
        at_most(what + "peak anonymous memory", megabytes(runs), "MB", 8000 if options.large else 4000),
    ]


if __name__ == "__main__":
    main()
