"""Which new layers learn fastest? Trains every init on the same text and compares.

    python -m benchmarks.inits tiny small smollm2

Every finished run is a line of OUT/MODEL.jsonl; started again, what is there is not run again. Tables and plots are
made from these lines. Learning rates are swept for each init, on seed 0, until the best one has a worse one on both
sides; the best one is then run with every seed. Without a model only tables and plots are made.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import click

from . import base, report, texts
from .bench import Bench
from .inits import INITS
from .leads import ALL, LEADS
from .places import places
from .training import Scratch, Setting

SUITES = {"inits": tuple(INITS), "leads": tuple(LEADS), "positions": ("copy_next", "opt_deus")}
DOCS = Path(__file__).parents[2] / "docs"


def setting_of(model: str, scratch: Path, prose: tuple[str, ...], code: tuple[str, ...]) -> Setting:
    """A model learns a text that it was not trained on: the tiny one prose, the others code."""
    folder = base.provide(model, scratch, prose)
    marks = base.fingerprint(folder), texts.fingerprint((*prose, *code))
    if model == "tiny":
        return Setting(model, folder, prose, code, *marks, steps=96)
    if model == "small":
        return Setting(model, folder, code, prose, *marks, steps=64)
    top = {"count": 4, "where": "top"}
    lrs = (3e-4, 1e-3, 3e-3)
    return Setting(model, folder, code, prose, *marks, top, steps=40, points=2, held_out=8, lrs=lrs)


@click.command(help=__doc__)
@click.argument("models", nargs=-1, type=click.Choice(["tiny", "small", "smollm2"]))
@click.option("--suite", type=click.Choice(list(SUITES)), default="inits")
@click.option("--init", "names", multiple=True, type=click.Choice(list(ALL)), help="Only these.")
@click.option("--seeds", default=5, show_default=True)
@click.option("--workers", default=2, show_default=True)
@click.option("--prose", multiple=True, default=["stdlib-docs"], help="Text files or folders.")
@click.option("--code", multiple=True, default=["stdlib"], help="The same.")
@click.option("--scratch", type=click.Path(path_type=Path), default=".bench/inits", show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=Path(__file__).parent, show_default=True)
@click.option("--pictures", type=click.Path(path_type=Path), default=DOCS, show_default=True)
@click.option("--steps", type=int, help="Of a run; to try the command.")
def main(models, suite, names, seeds, workers, prose, code, scratch, out, pictures, steps) -> None:
    out.mkdir(parents=True, exist_ok=True)
    for name in models:
        setting = setting_of(name, scratch, prose, code)
        setting = replace(setting, steps=steps or setting.steps)
        bench = Bench(scratch, out / f"{name}.jsonl", workers)
        if (Path(setting.folder) / base.FACTS).exists():
            shutil.copy(Path(setting.folder) / base.FACTS, out / f"{name}-base.json")
        chosen = names or SUITES[suite]
        bench.sweep(setting, chosen)
        bench.seeds(setting, chosen, seeds)
        if suite == "positions":
            for place, insert in places(setting, Scratch(scratch, setting)).items():
                bench.seeds(setting.at(insert, place), chosen, seeds, like=setting)
    report.write(out, pictures)


if __name__ == "__main__":
    main()
