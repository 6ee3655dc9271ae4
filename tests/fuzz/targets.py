"""What is fuzzed: which cases, and the way they go through the package."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from random import Random

from deus_merge import api
from deus_merge.checkpoint import Checkpoint
from deus_merge.checkpoint.header import read_header
from deus_merge.cli.main import run_command
from deus_merge.core.errors import DeusMergeError
from deus_merge.recipe.reader import parse_recipe
from deus_merge.recipe.writer import dump_recipe
from deus_merge.training.export import TRAINERS

from . import cases
from .workshop import RECIPES, Files, Workshop

LARGEST_MERGE = 4_000_000  # bytes; larger outputs are planned and not made
_PARSED = {raw: parse_recipe(raw.decode()) for raw in (json.dumps(data).encode() for data in RECIPES)}


@dataclass(frozen=True)
class Target:
    """One kind of case.

    Attributes:
        make: Draws the files that replace valid ones.
        run: Takes them through the package; True when nothing was refused.
        cost: Milliseconds of a case, about: what batches are sized by.
    """

    make: Callable[[Random, Workshop], Files]
    run: Callable[[Random, Workshop], bool]
    cost: float


def _refused(run: Callable[[], object]) -> bool:
    """Whether it was refused, as it should be: briefly, and with nothing a terminal would obey."""
    try:
        run()
    except DeusMergeError as error:
        text = str(error)
        assert all(c.isprintable() or c == "\n" for c in text), "the message is not printable"
        assert len(text) < 6000, f"the message has {len(text)} characters"
        return True
    return False


def open_header(r: Random, workshop: Workshop) -> bool:
    return not _refused(lambda: read_header(workshop.root / "base/model.safetensors"))


def open_checkpoint(r: Random, workshop: Workshop) -> bool:
    return not _refused(lambda: Checkpoint.open(workshop.root / "other").close())


def plan(r: Random, workshop: Workshop, merges: int = 40) -> bool:
    """The way of `deus-merge plan`; for every so many, that of `deus-merge merge` and `deus-merge verify`."""
    made: list[api.Plan] = []

    def way():
        text = (workshop.root / "recipe.yml").read_bytes()
        made.append(api.plan(_PARSED.get(text, "recipe.yml")))
        json.dumps(made[0].describe())
        dump_recipe(made[0].recipe)

    if _refused(way):
        return False
    if r.randrange(merges) == merges - 1 and made[0].bytes_written < LARGEST_MERGE:
        told = command("merge", "recipe.yml", "out", "--overwrite")
        if told == 0:
            command("verify", "out", *(["--quick"] if r.randrange(4) else []))
    if r.randrange(100) == 99:
        command("plan", "recipe.yml", *r.choice(([], ["--json"], ["--expand"], ["--expand", "--json"])))
    return True


def command(*arguments: str) -> int:
    """A command through the real entry point; what it says must be fit for a terminal."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = run_command(list(arguments))
    assert code in (0, 2, 3), f"{' '.join(arguments)}: exit code {code}\n{err.getvalue()[-3000:]}"
    for text in (out.getvalue(), err.getvalue()):
        strange = [c for c in text if not c.isprintable() and c != "\n"]
        assert not strange, f"{' '.join(arguments)} prints {strange[:5]!r}"
    return code


def unpickle(r: Random, workshop: Workshop) -> bool:
    """The same with pickles allowed."""
    recipe = _PARSED[(workshop.root / "recipe.yml").read_bytes()]
    made: list[api.Plan] = []
    if _refused(lambda: made.append(api.plan(recipe, load_options=api.LoadOptions(allow_pickle=True)))):
        return False
    if r.randrange(20) == 19 and made[0].bytes_written < LARGEST_MERGE:
        command("merge", "recipe.yml", "out", "--overwrite", "--allow-pickle")
    return True


def verify(r: Random, workshop: Workshop) -> bool:
    """Whatever reads a finished output, or an output that is a source."""
    if (workshop.root / "base/deus_merge.json").exists():
        return command("merge", "recipe.yml", "out", "--overwrite") == 0
    way = r.randrange(8)
    if way == 0:
        return command("strip", "done", "out", "--overwrite") == 0
    if way == 1:
        return command("export-training", "done", "--for", r.choice(sorted(TRAINERS))) == 0
    if way == 2:
        return command("report", "done", "--html", "out.html") == 0
    checked: list = []
    return not _refused(lambda: checked.append(api.verify("done", quick=way < 6))) and checked[0].passed


def merge(r: Random, workshop: Workshop) -> bool:
    return plan(r, workshop, merges=1)


TARGETS: Mapping[str, Target] = {
    "header": Target(cases.header, open_header, 0.3),
    "index": Target(cases.index, open_checkpoint, 0.5),
    "config": Target(cases.config, plan, 3),
    "recipe": Target(cases.recipe, plan, 3),
    "side_files": Target(cases.side_files, plan, 3),
    "places": Target(cases.places, plan, 3),
    "whole": Target(cases.everything, plan, 3),
    "merge": Target(cases.everything, merge, 15),
    "manifest": Target(cases.manifest, verify, 15),
    "modules": Target(cases.two_stacks, plan, 4),
    "adapter": Target(cases.adapter, plan, 4),
    "pickle": Target(cases.pickled, unpickle, 4),
}
