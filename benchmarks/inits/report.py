"""RESULTS.md out of the results of all suites."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from deus_merge.training.comparison.result import LEGEND

from .suites import MODELS, SUITES

_HEAD = """# Inits, places and optimizers

Written by `python -m benchmarks.inits MODEL --suite SUITE`, which is [`deus-merge compare`](../../docs/training.md)
on this project's models; every run is a line of `results/MODEL-SUITE/runs.jsonl`. The base is frozen and the new layers
train, all runs on the same windows in the same order, each candidate at its best learning rate."""


def write(results: Path, file: Path) -> None:
    """Write the report.

    Args:
        results: The folder with ``MODEL-SUITE`` folders.
        file: The report.
    """
    parts = [_HEAD, "", LEGEND, ""]
    for model, about in MODELS.items():
        for suite, of in SUITES.items():
            folder = results / f"{model}-{suite}"
            if not (folder / "results.json").exists():
                continue
            found = json.loads((folder / "results.json").read_text())
            settings = found["settings"]
            tokens = settings["steps"] * settings["batch"] * settings["length"]
            unfinished = "" if found["complete"] else " Not all runs are done."
            text = about.near if of.near else about.far
            parts += [
                f"## {model}, {suite}",
                "",
                f"{of.question}. {about.summary[0].upper()}{about.summary[1:]}; {text}; {tokens:,} tokens in"
                f" {settings['steps']} steps.{unfinished}",
                "",
                (folder / "table.md").read_text().rstrip(),
                "",
                f"![Losses and differences](results/{folder.name}/curves.svg)",
                "",
            ]
            picture = file.parent.parent.parent / "docs" / f"inits-{model}.svg"  # of a page
            if suite == "grid" and picture.exists() and (folder / "curves.svg").exists():
                shutil.copy(folder / "curves.svg", picture)
    file.write_text("\n".join(parts).rstrip() + "\n", encoding="utf-8")
