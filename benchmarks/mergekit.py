"""The same recipes by mergekit and by us, side by side, on 1.1B-shaped bfloat16 checkpoints: a base and two fine-tunes.

mergekit runs as its users run it, from the environment that ``make oracle`` makes, with torch's own choice of threads
and ``--lazy-unpickle``. ``--async-write`` would change nothing: it overlaps shards, and the output is one.

Both start from the command line with all sources in the page cache and nothing waiting for the disk; start-up counts.
We flush our output and verify it before it gets its name, mergekit does neither; ours without the check stands in the
table as well. What random methods choose differs, so the outputs of the others are compared. mergekit's ties takes the
differences of models in bfloat16, where many are equal, and any of the equal ones.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from common import (
    Figure,
    Run,
    Shape,
    deus_merge,
    fine_tuned,
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

ORACLE = Path(".venv-oracle/bin/mergekit-yaml")
OPTIONS = ("--lazy-unpickle", "--no-copy-tokenizer", "--quiet")
MEMORY = 0.5


@dataclass(frozen=True)
class Case:
    """A recipe both tools run.

    Attributes:
        recipe: With ``{base}``, ``{one}`` and ``{two}`` for models.
        bar: Our time over theirs.
        exact: Whether both must come to the same numbers, up to the arithmetic's rounding.
        more: What else mergekit must be told.
    """

    recipe: str
    bar: float
    exact: bool = True
    more: tuple[str, ...] = ()


_TASKS = """
merge_method: {method}
base_model: {{base}}
models:
  - {{{{model: {{one}}, parameters: {{{{weight: 0.5, density: 0.5}}}}}}}}
  - {{{{model: {{two}}, parameters: {{{{weight: 0.5, density: 0.5}}}}}}}}
dtype: bfloat16
"""
CASES = {
    "passthrough": Case("", 0.25, more=("--clone-tensors",)),  # its slices depend on the depth
    "linear": Case(
        """
merge_method: linear
models:
  - {{model: {one}, parameters: {{weight: 0.6}}}}
  - {{model: {two}, parameters: {{weight: 0.4}}}}
dtype: bfloat16
""",
        0.5,
    ),
    "slerp": Case(
        """
merge_method: slerp
base_model: {one}
models:
  - {{model: {one}}}
  - {{model: {two}}}
parameters: {{t: 0.4}}
dtype: bfloat16
""",
        0.5,
    ),
    "ties": Case(_TASKS.format(method="ties"), 0.15),
    "dare_ties": Case(_TASKS.format(method="dare_ties"), 0.15, exact=False),
}


def main() -> None:
    options = parser(__doc__, runs=3)
    options.add_argument("--layers", type=int, help="of the models (22)")
    options.add_argument("--only", nargs="+", choices=CASES, default=list(CASES))
    options.add_argument("--mergekit", type=Path, default=ORACLE, help=f"its command ({ORACLE})")
    options.add_argument("--skip-mergekit", action="store_true", help="ours alone")
    options = options.parse_args()
    if not options.skip_mergekit and not options.mergekit.exists():
        sys.exit(f"no mergekit at {options.mergekit}: run `make oracle`, or name it with --mergekit")
    shape = shape_of(options)
    base = random_checkpoint(options.scratch, shape)
    models = {"base": base, "one": fine_tuned(base, shape, 1), "two": fine_tuned(base, shape, 2)}
    figures: list[Figure] = []
    details: dict[str, object] = {"mergekit": {"options": OPTIONS}}
    for name in options.only:
        measured, told = compare(name, CASES[name], models, shape, options)
        figures += measured
        details |= told
    report(Path(__file__).stem, figures, options, details)


def compare(name: str, case: Case, models: Mapping[str, Path], shape: Shape, options) -> tuple[list[Figure], dict]:
    """Runs in turns: mergekit, ours, ours unverified."""
    scratch = options.scratch.resolve()
    recipe = scratch / f"mergekit-{name}.yml"
    text = case.recipe.format(**models) if case.recipe else upscale(models["one"], shape)
    recipe.write_text(text)
    theirs, ours = scratch / "mergekit-theirs", scratch / "mergekit-ours"
    arms = {
        "mergekit": [options.mergekit, recipe, theirs, *OPTIONS, *case.more],
        "ours": deus_merge("merge", recipe, ours, "--quiet"),
        "ours, --no-verify": deus_merge("merge", recipe, ours, "--quiet", "--no-verify"),
    }
    if options.skip_mergekit:
        arms.pop("mergekit")
    runs: dict[str, list[Run]] = {arm: [] for arm in arms}
    used = [folder for folder in models.values() if str(folder) in text]
    agreement: dict = {}
    try:
        for turn in range(options.runs):
            for arm, command in arms.items():
                out = theirs if arm == "mergekit" else ours
                shutil.rmtree(out, ignore_errors=True)
                settle(*used)
                runs[arm].append(run(command))
                print(f"{name}, {arm}: {runs[arm][-1].seconds:.1f} s", flush=True)
            if turn == 0 and "mergekit" in arms and case.exact:
                agreement = difference(ours, theirs)
    finally:
        for out in (theirs, ours):
            shutil.rmtree(out, ignore_errors=True)
    details = {f"{name}, {arm}": spread(r) for arm, r in runs.items()}
    mine = runs["ours"]
    if not (peer := runs.get("mergekit")):
        return [Figure(f"{name}: time", seconds(mine), "s"), Figure(f"{name}: memory", megabytes(mine), "MB")], details
    bare = Figure(f"{name}: time without the check of the output", seconds(runs["ours, --no-verify"]), "s")
    figures = [
        ratio_at_most(f"{name}: time", seconds(mine), seconds(peer), "s", "mergekit", case.bar),
        bare,
        ratio_at_most(f"{name}: peak anonymous memory", megabytes(mine), megabytes(peer), "MB", "mergekit", MEMORY),
    ]
    if agreement:
        details[f"{name}, agreement"] = agreement
        worst, what = agreement["largest difference, units"], f"{name}: largest difference in units of bfloat16"
        figures.append(Figure(what, worst, ""))
    return figures, details


def upscale(model: Path, shape: Shape) -> str:
    """The passthrough recipe: 22 -> 15 + 15 layers."""
    keep = (shape.layers * 15 + 21) // 22
    ranges = ((0, keep), (shape.layers - keep, shape.layers))
    slices = [f"  - sources: [{{model: {json.dumps(str(model))}, layer_range: {list(r)}}}]\n" for r in ranges]
    return "merge_method: passthrough\ndtype: bfloat16\nslices:\n" + "".join(slices)


def difference(ours: Path, theirs: Path) -> dict:
    """How two checkpoints of bfloat16 tensors differ: the largest difference in units of the last place of the larger
    number, and the share of elements more than one unit apart."""
    import torch

    from deus_merge.checkpoint.reader import Checkpoint

    mine, peers = Checkpoint.open(ours), Checkpoint.open(theirs)
    if mine.tensors.keys() != peers.tensors.keys():
        sys.exit(f"the outputs hold other tensors: {sorted(mine.tensors.keys() ^ peers.tensors.keys())[:3]}")
    worst, apart, count = 0.0, 0, 0
    for name in mine.tensors:
        for a, b in zip(*(c.read(name).flatten().split(1 << 22) for c in (mine, peers)), strict=True):
            a, b = a.float(), b.float()  # (m,)
            exponent = torch.frexp(torch.maximum(a.abs(), b.abs())).exponent - 8
            unit = torch.ldexp(torch.ones_like(a), exponent)  # (m,)
            units = (a - b).abs() / unit.clamp_(min=2.0**-133)  # (m,)
            worst, apart, count = max(worst, float(units.max())), apart + int((units > 1).sum()), count + len(a)
    return {"largest difference, units": worst, "share more than one unit apart": apart / count}


if __name__ == "__main__":
    main()
