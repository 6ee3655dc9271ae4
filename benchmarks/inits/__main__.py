"""Which new layers learn fastest, where, and with which optimizer? ``deus-merge compare`` on this project's models.

    python -m benchmarks.inits tiny smollm2 --suite grid

Every finished run is a line of OUT/MODEL-SUITE/runs.jsonl; started again, what is there is not run again. RESULTS.md is
made from these lines; without a model only that is done.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import click

from deus_merge import api
from deus_merge.run.device import choose_device
from deus_merge.training.comparison import parse_budget
from deus_merge.training.comparison.result import Comparison

from . import base, report
from .suites import MODELS, SUITES
from .texts import text_files

HERE = Path(__file__).parent


@click.command(help=__doc__)
@click.argument("models", nargs=-1, type=click.Choice(list(MODELS)))
@click.option("--suite", "suites", multiple=True, type=click.Choice(list(SUITES)), default=["grid"], show_default=True)
@click.option("--init", "inits", multiple=True, help="Only these.")
@click.option("--insert", "inserts", multiple=True, type=json.loads, help='Only these: {"count": 4, "where": "top"}.')
@click.option("--optimizer", "optimizers", multiple=True, help="Only these.")
@click.option("--without-growing", multiple=True, help="Only these: all, top, lora.")
@click.option("--lr", "rates", multiple=True, type=float, help="Only these rates; otherwise they are searched.")
@click.option("--seeds", type=int, help="Another number of seeds.")
@click.option("--tokens", type=int, help="Another number of tokens.")
@click.option("--batch", type=int, help="Another number of windows of a step.")
@click.option("--budget", help="Of each suite: 30min, 2M ...")
@click.option("--workers", default=1, show_default=True)
@click.option("--device", default="auto", show_default=True)
@click.option("--prose", multiple=True, default=["stdlib-docs"], help="Text files or folders.")
@click.option("--code", multiple=True, default=["stdlib"], help="The same.")
@click.option("--docs", multiple=True, default=["stdlib-docs"], help="The same: like the text of tiny and large.")
@click.option("--scratch", type=click.Path(path_type=Path), default=".bench/inits", show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=HERE / "results", show_default=True)
def main(models, suites, budget, workers, device, scratch, out, prose, code, docs, **chosen) -> None:
    texts = {"prose": prose, "code": code, "docs": docs}
    device = str(choose_device(device))
    for name in models:
        for suite_name in suites:
            model, suite = MODELS[name], SUITES[suite_name]
            options = replace(
                suite.options(model),
                **{key: value for key, value in chosen.items() if value},
                budget=parse_budget(budget) if budget else api.Budget(),
                workers=workers,
                device=device,
            )
            learned = model.near if suite.near else model.far
            known = texts[model.near] if model.watched and not suite.near else ()
            work, kept = scratch / f"{name}-{suite_name}", out / f"{name}-{suite_name}"
            _copy(kept, work)
            found = api.compare(
                base.provide(name, scratch, texts[model.near], device),
                work,
                text_files(texts[learned], scratch),
                options,
                base_text=text_files(known, scratch),
                on_run=_progress,
                on_stage=click.echo,
            )
            found.write()
            _copy(work, kept)
            _describe(found, kept)
    out.mkdir(parents=True, exist_ok=True)
    report.write(out, out.parent / "RESULTS.md")


def _copy(source: Path, target: Path) -> None:
    """Copy the results of a comparison, without its work."""
    for name in ("comparison.json", "runs.jsonl", "curves.svg"):
        if (source / name).exists():
            target.mkdir(parents=True, exist_ok=True)
            shutil.copy(source / name, target / name)


def _describe(found: Comparison, folder: Path) -> None:
    """Write what the report needs."""
    (folder / "results.json").write_text(json.dumps(found.describe() | {"folder": ""}, indent=1) + "\n")
    (folder / "table.md").write_text(found.markdown() + "\n")


def _progress(run, left: int, seconds: float) -> None:
    click.echo(
        f"{run['init']} {run['insert']} {run['optimizer']} lr {run['lr']:g} seed {run['seed']}:"
        f" {run['initial']:.4f} -> {run['final']:.4f}, {run['seconds']:.0f} s; about {left} runs,"
        f" {seconds / 60:.0f} min left"
    )


if __name__ == "__main__":
    main()
