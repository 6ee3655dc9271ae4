"""SmolLM2-135M, 30 -> 45 layers: time, memory, and how exact every transport plan is, beside the plain way.

On real layers the cost reaches 200 times the regularisation, where exp(-cost/reg) is zero in float32: POT's plain
Sinkhorn returns after its first pass, with plans that are all zero or nearly so. Its marginal errors say it.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

from common import Figure, Run, at_most, deus_merge, median, megabytes, parser, report, run, seconds, settle, spread
from common import table as text_table
from ot_fuse_memory import plans_of

PRESETS = ("opt_deus", "opt_deus_paper")


def main() -> None:
    options = parser(__doc__, runs=3)
    options.add_argument("--model", type=Path, help="a converted copy; by default one is made in the scratch folder")
    options.add_argument("--plain-runs", type=int, default=1)
    options = options.parse_args()
    if options.model is None:
        from deus_merge.models.demo import smollm2

        options.model = smollm2(options.scratch.resolve())
    out = options.scratch.resolve() / "smollm2-out"
    shutil.rmtree(out, ignore_errors=True)
    runs: dict[str, list[Run]] = {name: [] for name in (*PRESETS, "plain")}
    plans: dict[str, list[dict]] = {}
    where = "{count: 2, where: top}" if options.small else "top_half"
    try:
        for turn in range(options.runs):
            for preset in PRESETS:
                settle(options.model)
                command = deus_merge("upscale", options.model, out, "--preset", preset, "--insert", where, "--quiet")
                runs[preset].append(run(command))
                plans[preset] = plans_of(out)
                shutil.rmtree(out)
            if turn < options.plain_runs and not options.small:
                settle(options.model)
                plain = Path(__file__).with_name("ot_fuse_memory.py")
                runs["plain"].append(run([sys.executable, plain, "--plain", options.model, out]))
                plans["plain"] = json.loads(runs["plain"][-1].stdout.splitlines()[-1])["plans"]
                shutil.rmtree(out)
    finally:
        shutil.rmtree(out, ignore_errors=True)
    report(Path(__file__).stem, _figures(runs, plans, 32 if options.small else 45), options, _details(runs, plans))


def _figures(runs: dict[str, list[Run]], plans: dict[str, list[dict]], depth: int) -> list[Figure]:
    figures = []
    for preset in PRESETS:
        mine, what = runs[preset], f"SmolLM2-135M 30 -> {depth}, {preset}"
        took, bar = seconds(mine), 60
        peer = (seconds(runs["plain"]), "plain way, void plans") if runs["plain"] else (None, "")
        worst = _worst(plans[preset])
        figures += [
            Figure(f"{what}: time", took, "s", f"<= {bar} s", took <= bar, *peer),
            at_most(f"{what}: peak anonymous memory", megabytes(mine), "MB", 700),
            Figure(
                f"{what}: largest L1 marginal error of {len(plans[preset])} plans", worst, "", "<= 1e-4", worst <= 1e-4,
                *((_worst(plans["plain"]), "plain way") if runs["plain"] else (None, "")),
            ),
        ]  # fmt: skip
    return figures


def _worst(plans: list[dict]) -> float:
    return max(p["marginal_error"] for p in plans)


def _details(runs: dict[str, list[Run]], plans: dict[str, list[dict]]) -> dict:
    details: dict = {name: spread(r) for name, r in runs.items() if r}
    rows = []
    for preset in PRESETS:
        for role in dict.fromkeys(p["role"] for p in plans[preset]):
            of_role = [p for p in plans[preset] if p["role"] == role]
            told = {
                "iterations": median([p["iterations"] for p in of_role]),
                "most": max(p["iterations"] for p in of_role),
                "seconds": sum(p["seconds"] for p in of_role),
                "reg": median([p["reg"] or 0 for p in of_role]),
                "support": median([p["effective_support"] for p in of_role]),
                "marginal_error": _worst(of_role),
            }
            details.setdefault("roles", {}).setdefault(preset, {})[role] = told
            rows.append((preset, role, *(f"{v:.3g}" if v < 1000 else f"{v:.0f}" for v in told.values())))
    columns = ("preset", "role", "median passes", "most", "seconds in all", "median reg", "support", "marginal error")
    print(text_table(rows, columns))
    if runs["plain"]:
        details["plain way's marginal errors"] = {}
        for role in sorted({p["role"] for p in plans["plain"]}):
            errors = [p["marginal_error"] for p in plans["plain"] if p["role"] == role]
            details["plain way's marginal errors"][role] = {"median": median(errors), "largest": max(errors)}
            print(f"plain way, {role}: L1 marginal error {median(errors):.3g} median, {max(errors):.3g} largest")
    return details


if __name__ == "__main__":
    main()
